"""Weight versions: what a state is, what changed between two, and the store that holds them."""

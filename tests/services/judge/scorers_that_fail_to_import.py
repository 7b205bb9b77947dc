"""A user's module with a mistake in it."""

raise RuntimeError("my database is away")

"""The trainer: reads scored windows, makes preference pairs, updates the policy, sends the weights back."""

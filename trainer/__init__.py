"""The trainer: reads scored documents, makes preference pairs, updates the policy, sends the weights back."""

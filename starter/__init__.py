"""A small world with ground truth: its grammar, its checker, its tiny models and how they are made.

Nothing in services or trainer knows of this package; it only uses what a user could use.
"""

"""Where documents come from: one reader per format, dealt into parts and shuffled with exact resume (source.py)."""

"""The rewriter: a teacher model's better version of each suffix."""

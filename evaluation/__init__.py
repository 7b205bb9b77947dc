"""What the paper measures, on checkpoints. Called by benchmarks and the command line, never by a service.

from evaluation.likelihood import held_out_prefixes, teacher_log_prob

prefixes = held_out_prefixes(Path("held-out.jsonl"), policy, num_prefixes=200, prefix_tokens=64)
result = teacher_log_prob(policy, teacher, prefixes, new_tokens=64, seed=0)
result.mean_log_prob, result.half_width, result.distinct_4
"""

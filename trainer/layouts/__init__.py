"""How a step's windows become forward passes: `tree` and `separate` behind one seam (base.py).

layout = SeparateLayout()
(plans,) = layout.plan(windows, max_tokens=8192)            # of the only rank
for plan in plans:
    log_probs = model(layout.lay_out(plan, device=device))  # (M,) one a suffix: SuffixLogProbs
"""

"""How a step's windows become forward passes: `tree` and `separate` behind one seam (base.py).

    layout = choose_layout([policy, reference], settings.trainer, device=device, compute_dtype=torch.float32)
    (plans,) = layout.plan(windows, max_tokens=8192)             # of the only rank
    for plan in plans:
        log_probs = policy(layout.lay_out(plan, device=device))  # (M,) one a suffix: SuffixLogProbs

    trial.py      which layout the models fit
    packing.py    units -> ranks and passes
    tree.py       a window once, and a branch for each candidate; its kernels: merged.py (CPU), flex.py (CUDA),
                  Dense of kernels.py (the reference). shape.py is what they read
    separate.py   each suffix after its own copy of the prefix
"""

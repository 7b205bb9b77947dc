"""The trainer: reads scored windows, makes preference pairs, updates the policy, publishes its weights.

    from trainer.assembly import train

    train(settings, stop=threading.Event())     # what `python -m trainer --config FILE` does

The loop is loop.py; assembly.py puts it together. A window goes through inbox -> preferences -> batches -> losses.
"""

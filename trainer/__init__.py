"""The trainer: reads scored windows, makes preference pairs, updates the policy, publishes its weights.

    from threading import Event
    from shared.configuration import load_settings
    from trainer.assembly import train

    train(load_settings(Path("run.toml"), []), stop=Event())     # python -m trainer --config run.toml

The loop is loop.py; assembly.py puts it together. A window goes through inbox -> preferences -> batches -> losses.
"""

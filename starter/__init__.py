"""A small world with ground truth: its documents, its checker, its tiny models and the recipe that makes them.

    from starter.checker import Checker
    from starter.world import World

    world = World(0)
    verdict = Checker(world).check(" You are a lazy liar.", prefix="This is a tale of Northey.")
    verdict.safe, verdict.num_correct  # (False, 0)

Nothing in services or trainer knows about this package. The world uses `shared` only; `starter.recipe`, which runs at
build time, also uses services and trainer.
"""

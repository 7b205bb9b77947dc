"""The Engine seam: what a service asks of a language model, and the engines that answer."""

from services.engine.base import Engine, Generation, Sampling

__all__ = ["Engine", "Generation", "Sampling"]

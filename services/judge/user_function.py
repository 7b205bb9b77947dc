"""The python criterion: a user's own function scores the candidates.

    def score(prefix: str, candidates: list[str], reference: str) -> list[float]:    # or async def
        return [1.0 if "http" not in text else 0.0 for text in candidates]    # each in [0, 1]

`prefix` is the whole window before the chunk.
"""

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.judge.criteria import CriterionError, JudgedChunk, Scores
from services.judge.verdicts import CallCount
from shared.errors import SettingsError

UserFunction = Callable[[str, list[str], str], Any]

_SETTING = "judge.criteria.python.function"


def load_function(place: str) -> UserFunction:
    """Import `module:name`. Raises SettingsError if that fails, whatever the module raised."""
    module_name, _, name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise SettingsError(f"{_SETTING} = {place!r}: importing {module_name!r} raised {exc!r}") from exc
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingsError(f"{_SETTING} = {place!r}: {module_name} has no function {name!r}")
    found: UserFunction = function
    return found


def function_source(function: UserFunction) -> str:
    """The source of its whole module, since other functions and constants matter too; its name if there is none."""
    try:
        module = inspect.getmodule(function)
        return inspect.getsource(module if module is not None else function)
    except (OSError, TypeError):
        return repr(getattr(function, "__qualname__", type(function).__qualname__))


@dataclass(frozen=True)
class PythonCriterion:
    """A sync function runs in a thread: it may block, and it may be called for several chunks at once."""

    function: UserFunction
    timeout_s: float

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        try:
            async with asyncio.timeout(self.timeout_s):
                values = await self._call(chunk.window.text[: chunk.item.start], chunk.texts, chunk.reference)
        except TimeoutError as exc:
            raise _failure(f"gave no scores within {self.timeout_s} s") from exc
        except Exception as exc:
            raise _failure(f"raised {type(exc).__name__}: {exc}") from exc
        return Scores(_checked(values, num_candidates=len(chunk.texts)))

    async def _call(self, *texts: Any) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(*texts)
        return await asyncio.to_thread(self.function, *texts)


def _checked(values: Any, *, num_candidates: int) -> list[float]:
    try:
        scores = [float(value) for value in values]
    except (TypeError, ValueError) as exc:
        raise _failure(f"must return a list of numbers, got {values!r:.200}") from exc
    if len(scores) != num_candidates:
        raise _failure(f"returned {len(scores)} scores for {num_candidates} candidates")
    if wrong := [score for score in scores if not (math.isfinite(score) and 0.0 <= score <= 1.0)]:
        raise _failure(f"returned {wrong[0]}, scores must lie in [0, 1]")
    return scores


def _failure(message: str) -> CriterionError:
    return CriterionError("python_criterion", f"{_SETTING} {message}")

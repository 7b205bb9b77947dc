"""The python criterion: a user's own function scores the candidates.

    def score(prefix: str, candidates: list[str], reference: str) -> list[float]:    # or async def
        return [1.0 if "http" not in text else 0.0 for text in candidates]    # each in [0, 1], or None

`prefix` is the whole window before the chunk. A candidate with None is unscored: neither chosen nor rejected.
"""

import asyncio
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.judge.criteria import CriterionError, JudgedChunk, Scores
from services.judge.verdicts import CallCount
from shared.errors import SettingsError

UserFunction = Callable[[str, list[str], str], Any]


def load_function(place: str, *, setting: str) -> UserFunction:
    """Import `module:name`. Raises SettingsError if that fails, whatever the module raised. `setting` is the place's
    name in the settings, such as `judge.criteria.python.function`."""
    module_name, _, name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise SettingsError(f"{setting} = {place!r}: importing {module_name!r} raised {exc!r}") from exc
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingsError(f"{setting} = {place!r}: {module_name} has no function {name!r}")
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
    setting: str
    """What names the function, for messages: `judge.criteria.NAME.function`."""

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        try:
            async with asyncio.timeout(self.timeout_s):
                values = await self._call(chunk.window.text[: chunk.item.start], chunk.texts, chunk.reference)
        except TimeoutError as exc:
            raise self._failure(f"gave no scores within {self.timeout_s} s") from exc
        except Exception as exc:
            raise self._failure(f"raised {type(exc).__name__}: {exc}") from exc
        return Scores(self._checked(values, num_candidates=len(chunk.texts)))

    async def _call(self, *texts: Any) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(*texts)
        return await asyncio.to_thread(self.function, *texts)

    def _checked(self, values: Any, *, num_candidates: int) -> list[float | None]:
        try:
            scores = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError) as exc:
            raise self._failure(f"must return a list of numbers, got {values!r:.200}") from exc
        if len(scores) != num_candidates:
            raise self._failure(f"returned {len(scores)} scores for {num_candidates} candidates")
        if wrong := [score for score in scores if score is not None and not 0.0 <= score <= 1.0]:  # NaN is wrong too
            raise self._failure(f"returned {wrong[0]}, scores must lie in [0, 1]")
        return scores

    def _failure(self, message: str) -> CriterionError:
        return CriterionError("python_criterion", f"{self.setting} {message}")

"""The engines of a judge: one for all criteria, or one for each that names its own. They start and end together.

engines = JudgeEngines.of(settings.judge)
life = EngineLife(engines, build=...)          # starts them
engines.by_criterion["quality"].score(...)
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

from services.concurrency import all_of
from services.engine.base import Engine, FallibleEngine
from services.engine.life import build_engine
from shared.engine_settings import EngineSettings
from shared.judge_settings import JudgeSettings


def engine_settings(settings: JudgeSettings, name: str) -> EngineSettings:
    """Of the criterion `name`."""
    return settings.criteria[name].engine or settings.engine


def asks_model(settings: JudgeSettings, name: str) -> bool:
    """Whether the criterion needs a language model's engine."""
    return settings.kind(name) not in ("python", "classifier")


class JudgeEngines:
    """By criterion. Criteria with equal engine settings share one. A `Startable` and a `FallibleEngine`."""

    def __init__(self, by_criterion: Mapping[str, Engine]) -> None:
        self.by_criterion = by_criterion
        self._engines = list({id(engine): engine for engine in by_criterion.values()}.values())
        self.name = ", ".join(engine.name for engine in self._engines) or "none"

    @classmethod
    def of(cls, settings: JudgeSettings, *, replacement: Engine | None = None) -> Self:
        """Not started yet. `replacement` takes the place of all of them. SettingsError if one can't be built."""
        if replacement is not None:
            return cls({name: replacement for name in settings.criteria if asks_model(settings, name)})
        sharing: dict[str, list[str]] = {}
        for name in settings.criteria:
            if asks_model(settings, name):
                sharing.setdefault(engine_settings(settings, name).model_dump_json(), []).append(name)
        return cls(
            {name: engine for names in sharing.values() for engine in [_build(settings, names)] for name in names}
        )

    @property
    def failure(self) -> str:
        failures = (engine.failure for engine in self._engines if isinstance(engine, FallibleEngine))
        return next((failure for failure in failures if failure), "")

    async def start(self) -> None:
        await all_of(engine.start() for engine in self._engines)

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))


def _build(settings: JudgeSettings, names: Sequence[str]) -> Engine:
    """The engine that these criteria share."""
    criteria = [settings.criteria[name] for name in names]
    return build_engine(
        engine_settings(settings, names[0]),
        constrains=any(criterion.verdict == "structured" for criterion in criteria),
        adapters=tuple(dict.fromkeys(criterion.lora_adapter for criterion in criteria if criterion.lora_adapter)),
    )

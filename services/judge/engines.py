"""The models of a judge: an engine for all criteria, or one for each that names its own, and classifiers. They start
and end together.

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
from services.judge.classifier import Classifier
from shared.judge_settings import JudgeSettings


class JudgeEngines:
    """By criterion. Criteria with equal engine settings share one. A `Startable` and a `FallibleEngine`."""

    def __init__(self, by_criterion: Mapping[str, Engine], classifiers: Mapping[str, Classifier]) -> None:
        self.by_criterion = by_criterion
        self.classifiers = classifiers
        self._engines = list({id(engine): engine for engine in by_criterion.values()}.values())
        self._parts: list[Engine | Classifier] = [*self._engines, *classifiers.values()]
        self.name = ", ".join(engine.name for engine in self._engines) or "none"

    @classmethod
    def of(cls, settings: JudgeSettings, *, replacement: Engine | None = None) -> Self:
        """Not started yet. `replacement` takes the place of all of them. SettingsError if one can't be built."""
        asking = [name for name in settings.criteria if settings.asks_model(name)]
        classifiers = _classifiers(settings)
        if replacement is not None:
            return cls(dict.fromkeys(asking, replacement), classifiers)
        sharing: dict[str, list[str]] = {}
        for name in asking:
            sharing.setdefault(settings.engine_of(name).model_dump_json(), []).append(name)
        built: dict[str, Engine] = {}
        for names in sharing.values():
            built |= dict.fromkeys(names, _build(settings, names))
        return cls(built, classifiers)

    @property
    def failure(self) -> str:
        failures = (engine.failure for engine in self._engines if isinstance(engine, FallibleEngine))
        return next((failure for failure in failures if failure), "")

    async def start(self) -> None:
        await all_of(part.start() for part in self._parts)

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self._parts))


def _classifiers(settings: JudgeSettings) -> dict[str, Classifier]:
    cut = settings.max_prefix_characters
    return {
        name: Classifier(name, criterion, settings.engine_of(name), max_prefix_characters=cut)
        for name, criterion in settings.criteria.items()
        if settings.kind(name) == "classifier"
    }


def _build(settings: JudgeSettings, names: Sequence[str]) -> Engine:
    """The engine that these criteria share."""
    criteria = [settings.criteria[name] for name in names]
    return build_engine(
        settings.engine_of(names[0]),
        constrains=any(criterion.verdict == "structured" for criterion in criteria),
        adapters=tuple(dict.fromkeys(criterion.lora_adapter for criterion in criteria if criterion.lora_adapter)),
    )

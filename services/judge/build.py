"""From settings to a `Judge`, in two steps, so that a wrong prompt or function stops the service before it loads a
model: `load_parts` reads files and imports functions, `build_judge` joins them with the started engine.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.base import Engine
from services.judge.criteria import Criterion, FramedPrompt, Pairwise, Pointwise
from services.judge.judge import Judge, WeightedCriterion
from services.judge.likelihood import Likelihood, TokenReading
from services.judge.user_function import PythonCriterion, UserFunction, function_source, load_function
from services.judge.verdicts import (
    FACTUALITY_LABELS,
    FACTUALITY_VERDICTS,
    QUALITY_LABELS,
    QUALITY_VERDICTS,
    SAFETY_LABELS,
    SAFETY_VERDICTS,
    AnswerVerdict,
    LabelVerdict,
    VerdictSource,
)
from services.prompts import Prompt
from shared.errors import SettingsError
from shared.settings import CriterionName, CriterionSettings, JudgeSettings

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Question:
    """What a prompted criterion asks: its placeholders, its verdicts and its label words."""

    kind: Callable[[FramedPrompt, VerdictSource], Criterion]
    required: frozenset[str]
    allowed: frozenset[str]
    verdicts: Mapping[str, float]
    labels: tuple[str, ...]


QUESTIONS: Mapping[CriterionName, Question] = {
    "quality": Question(Pairwise, frozenset({"a", "b"}), frozenset({"prefix"}), QUALITY_VERDICTS, QUALITY_LABELS),
    "safety": Question(Pointwise, frozenset({"candidate"}), frozenset({"prefix"}), SAFETY_VERDICTS, SAFETY_LABELS),
    "factuality": Question(
        Pointwise,
        frozenset({"candidate", "reference"}),
        frozenset({"prefix"}),
        FACTUALITY_VERDICTS,
        FACTUALITY_LABELS,
    ),
}


@dataclass(frozen=True)
class Parts:
    """What was read from files before the engine runs."""

    prompts: Mapping[CriterionName, Prompt]
    function: UserFunction | None


def load_parts(settings: JudgeSettings) -> Parts:
    """Raises SettingsError for a prompt or function that can't be used."""
    prompts = {name: load_prompt(name, criterion) for name, criterion in settings.criteria.items() if name in QUESTIONS}
    python = settings.criteria.get("python")
    return Parts(prompts, load_function(python.function) if python else None)


def load_prompt(name: CriterionName, criterion: CriterionSettings) -> Prompt:
    """The file of the settings, or the shipped one for this kind of verdict."""
    shipped = PROMPTS / (f"{name}_labels.txt" if criterion.verdict == "labels" else f"{name}.txt")
    question = QUESTIONS[name]
    return Prompt.load(criterion.prompt or shipped, required=question.required, allowed=question.allowed)


def asks_structured(settings: JudgeSettings) -> bool:
    """Whether a criterion holds answers to a pattern."""
    return any(criterion.verdict == "structured" for name, criterion in settings.criteria.items() if name in QUESTIONS)


def needs_engine(settings: JudgeSettings) -> bool:
    return set(settings.criteria) != {"python"}


def build_judge(settings: JudgeSettings, parts: Parts, *, engine: Engine, reading: TokenReading | None) -> Judge:
    """`engine` has started; `reading` is None where no criterion reads tokens. SettingsError where they don't fit."""
    check_engine(settings, engine)
    chat = engine.has_chat_template if settings.chat is None else settings.chat
    if chat and not engine.has_chat_template and parts.prompts:
        raise SettingsError(f"judge.chat = true, but {engine.name} has no chat template: set it to false")
    builder = _Builder(settings, parts, engine, chat, reading)
    return Judge(
        {
            name: WeightedCriterion(builder.criterion(name, criterion), criterion.weight)
            for name, criterion in settings.criteria.items()
        },
        fingerprint=fingerprint(
            model=engine.name,
            chat=chat,
            max_prefix_characters=settings.max_prefix_characters,
            criteria=_described(settings, parts),
        ),
        wants_token_ids=reading is not None and reading.shares_policy_tokens,
    )


class _Builder:
    """Makes the criteria of one judge; they share the gate to its engine."""

    def __init__(
        self, settings: JudgeSettings, parts: Parts, engine: Engine, chat: bool, reading: TokenReading | None
    ) -> None:
        self._settings = settings
        self._parts = parts
        self._engine = engine
        self._chat = chat
        self._reading = reading
        self._gate = asyncio.Semaphore(settings.engine.max_queued_requests)

    def criterion(self, name: CriterionName, criterion: CriterionSettings) -> Criterion:
        if name == "likelihood":
            return self._likelihood(criterion)
        if name == "python":
            assert self._parts.function is not None
            return PythonCriterion(self._parts.function, timeout_s=self._settings.engine.timeout_s)
        return self._prompted(name, criterion)

    def _likelihood(self, criterion: CriterionSettings) -> Likelihood:
        assert self._reading is not None
        return Likelihood(
            self._engine,
            reading=self._reading,
            scale=criterion.scale,
            max_prefix_characters=self._settings.max_prefix_characters,
            gate=self._gate,
        )

    def _prompted(self, name: CriterionName, criterion: CriterionSettings) -> Criterion:
        prompt = FramedPrompt(
            self._parts.prompts[name],
            self._engine,
            chat=self._chat,
            opens_answer=criterion.verdict == "labels",
            max_prefix_characters=self._settings.max_prefix_characters,
        )
        return QUESTIONS[name].kind(prompt, self._verdicts(name, criterion))

    def _verdicts(self, name: CriterionName, criterion: CriterionSettings) -> VerdictSource:
        question = QUESTIONS[name]
        if criterion.verdict == "labels":
            values = [question.verdicts[label.strip()] for label in question.labels]
            return LabelVerdict(self._engine, labels=question.labels, values=values, gate=self._gate)
        return AnswerVerdict(
            self._engine,
            settings=criterion,
            verdicts=question.verdicts,
            max_retries=self._settings.max_retries,
            gate=self._gate,
        )


def check_engine(settings: JudgeSettings, engine: Engine) -> None:
    """SettingsError where a criterion asks for what the started engine can't do."""
    if not engine.can_constrain and asks_structured(settings):
        raise SettingsError(
            f"judge.criteria: verdict = 'structured' holds answers to a pattern, which {engine.name} can't: "
            "use engine.kind = 'vllm', an endpoint of vLLM's, or verdict = 'answer'"
        )
    if engine.can_score:
        return
    for name, criterion in settings.criteria.items():
        if name == "likelihood" or (name in QUESTIONS and criterion.verdict == "labels"):
            raise SettingsError(
                f"judge.criteria.{name} compares log-probs of given tokens, which {engine.name} does not give: "
                f"use engine.kind = 'transformers'{'' if name == 'likelihood' else ', or verdict = `answer`'}"
            )


def _described(settings: JudgeSettings, parts: Parts) -> dict[str, dict[str, Any]]:
    """What each criterion is made of: a prompt counts by its text, a function by its source."""
    return {
        name: criterion.model_dump(exclude={"prompt"})
        | {"prompt": parts.prompts[name].text if name in parts.prompts else ""}
        | {"source": function_source(parts.function) if name == "python" and parts.function else ""}
        for name, criterion in settings.criteria.items()
    }


def fingerprint(
    *, model: str, chat: bool, max_prefix_characters: int, criteria: Mapping[str, Mapping[str, Any]]
) -> str:
    """16 hex digits of SHA-256 over model name, prompts' texts, criteria's settings and the user's source.

    The order in which criteria are named does not matter; ports, addresses and limits are not part of it. A model
    folder counts by its name: put other weights under another name.
    """
    parts = {"model": model, "chat": chat, "max_prefix_characters": max_prefix_characters, "criteria": criteria}
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

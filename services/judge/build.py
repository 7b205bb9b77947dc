"""From settings to a `Judge`, in two steps: a wrong prompt or function stops the service before it loads a model.

`load_parts` reads the prompts and imports the user's function; `build_judge` needs the started engine.
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from services.engine.base import Engine
from services.engine.life import build_engine
from services.judge.criteria import Criterion, FramedPrompt
from services.judge.judge import Judge
from services.judge.likelihood import Likelihood, TokenReading
from services.judge.questions import QUESTIONS, Question, load_prompt
from services.judge.user_function import PythonCriterion, UserFunction, function_source, load_function
from services.judge.verdicts import AnswerVerdict, LabelVerdict, VerdictSource
from services.prompts import Prompt
from shared.errors import EngineError, SettingsError
from shared.judge_settings import CriterionName, CriterionSettings, JudgeSettings

_PYTHON = "judge.criteria.python.function"


@dataclass(frozen=True)
class Parts:
    prompts: Mapping[CriterionName, Prompt]
    function: UserFunction | None


def load_parts(settings: JudgeSettings) -> Parts:
    """Raises SettingsError for a prompt or function that can't be used."""
    prompts = {name: load_prompt(name, criterion) for name, criterion in settings.criteria.items() if name in QUESTIONS}
    python = settings.criteria.get("python")
    return Parts(prompts, load_function(python.function, setting=_PYTHON) if python else None)


def judge_engine(settings: JudgeSettings) -> Engine:
    """The engine of the settings, not started yet."""
    if not needs_engine(settings):
        return NoEngine()
    return build_engine(settings.engine, constrains=_asks_structured(settings))


def needs_engine(settings: JudgeSettings) -> bool:
    return set(settings.criteria) != {"python"}


def build_judge(settings: JudgeSettings, parts: Parts, *, engine: Engine, reading: TokenReading | None) -> Judge:
    """`engine` has started; `reading` is None unless a criterion is `likelihood`. SettingsError if they don't fit."""
    check_engine(settings, engine)
    chat = engine.has_chat_template if settings.chat is None else settings.chat
    if chat and not engine.has_chat_template and parts.prompts:
        raise SettingsError(f"judge.chat = true, but {engine.name} has no chat template: set it to false")
    gate = asyncio.Semaphore(settings.engine.max_queued_requests)
    builder = _Builder(settings, parts, engine, chat, reading, gate)
    return Judge(
        {name: builder.criterion(name, criterion) for name, criterion in settings.criteria.items()},
        weights={name: criterion.weight for name, criterion in settings.criteria.items()},
        fingerprint=_fingerprint(settings, parts, model=engine.name, chat=chat),
        wants_token_ids=reading is not None and reading.shares_policy_tokens,
    )


def check_engine(settings: JudgeSettings, engine: Engine) -> None:
    """SettingsError if a criterion needs what the started engine can't do."""
    if not engine.can_constrain and _asks_structured(settings):
        raise SettingsError(
            f"judge.criteria: verdict = 'structured' constrains answers to a pattern, which {engine.name} can't: "
            "use engine.kind = 'vllm', a vLLM endpoint, or verdict = 'answer'"
        )
    if engine.can_score:
        return
    for name, criterion in settings.criteria.items():
        if name == "likelihood" or (name in QUESTIONS and criterion.verdict == "labels"):
            raise SettingsError(
                f"judge.criteria.{name} compares log-probs of given tokens, which {engine.name} does not give: "
                f"use engine.kind = 'transformers'{'' if name == 'likelihood' else ', or verdict = `answer`'}"
            )


def _asks_structured(settings: JudgeSettings) -> bool:
    return any(criterion.verdict == "structured" for name, criterion in settings.criteria.items() if name in QUESTIONS)


@dataclass(frozen=True)
class _Builder:
    settings: JudgeSettings
    parts: Parts
    engine: Engine
    chat: bool
    reading: TokenReading | None
    gate: asyncio.Semaphore

    def criterion(self, name: CriterionName, criterion: CriterionSettings) -> Criterion:
        max_characters = self.settings.max_prefix_characters
        if name == "likelihood":
            assert self.reading is not None
            return Likelihood(self.engine, self.gate, self.reading, criterion.scale, max_characters)
        if name == "python":
            assert self.parts.function is not None
            return PythonCriterion(self.parts.function, self.settings.engine.timeout_s, setting=_PYTHON)
        opens_answer = self.chat and criterion.verdict == "labels"
        prompt = FramedPrompt(self.parts.prompts[name], self.engine, self.chat, opens_answer, max_characters)
        return QUESTIONS[name].kind(prompt, self._source(QUESTIONS[name], criterion))

    def _source(self, question: Question, criterion: CriterionSettings) -> VerdictSource:
        if criterion.verdict == "labels":
            values = [question.verdicts[label.strip()] for label in question.labels]
            return LabelVerdict(self.engine, self.gate, question.labels, values)
        return AnswerVerdict(self.engine, self.gate, criterion, question.verdicts, self.settings.max_retries)


def _fingerprint(settings: JudgeSettings, parts: Parts, *, model: str, chat: bool) -> str:
    """16 hex digits of SHA-256 over model name, prompt texts, criteria settings and the user's source, not over
    addresses and limits. A model folder counts by its name: give other weights another name."""
    criteria = {
        name: criterion.model_dump(exclude={"prompt"})
        | {"prompt": parts.prompts[name].text if name in parts.prompts else ""}
        | {"source": function_source(parts.function) if name == "python" and parts.function else ""}
        for name, criterion in settings.criteria.items()
    }
    judge = {"model": model, "chat": chat, "max_prefix_characters": settings.max_prefix_characters}
    content = json.dumps(judge | {"criteria": criteria}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class NoEngine:
    """The engine of a judge whose only criterion is a python function: it starts at once and answers nothing."""

    name = "none"
    weight_version = 0
    can_score = can_constrain = can_grade = has_tokenizer = has_chat_template = False

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def _refuse(self, *_given: object, **_named: object) -> NoReturn:
        raise EngineError("this judge has no model: its only criterion is a python function")

    generate = score = encode = encode_content = decode = render_chat = load_weights = _refuse

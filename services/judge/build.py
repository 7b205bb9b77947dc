"""From settings to a `Judge`, in two steps: a wrong prompt or function stops the service before it loads a model.

`load_parts` reads the prompts and imports the user's functions; `build_judge` needs the started engines.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from services.engine.base import Engine
from services.frames import Frame
from services.judge.asker import Asker
from services.judge.criteria import Criterion, Pairwise, Pointwise, Prompted
from services.judge.judge import Judge
from services.judge.likelihood import Likelihood, TokenReading
from services.judge.questions import Question, load_prompt, question_of
from services.judge.rewards import Rule
from services.judge.tempers import TempersOfChunks
from services.judge.user_function import PythonCriterion, UserFunction, function_source, load_function
from services.judge.verdict_memory import VerdictMemory
from services.judge.verdicts import AnswerVerdict, LabelVerdict, VerdictSource
from services.prompts import Prompt
from shared.errors import SettingsError
from shared.judge_settings import JudgeSettings


@dataclass(frozen=True)
class Parts:
    """What settings name, loaded. By criterion."""

    questions: Mapping[str, Question]
    prompts: Mapping[str, Prompt]
    functions: Mapping[str, UserFunction]


def load_parts(settings: JudgeSettings) -> Parts:
    """Raises SettingsError for a criterion, prompt or function that can't be used."""
    questions, prompts, functions = {}, {}, {}
    for name, criterion in settings.criteria.items():
        kind = settings.kind(name)
        if question := question_of(name, kind, criterion):
            questions[name], prompts[name] = question, load_prompt(kind, criterion, question)
        if kind == "python":
            functions[name] = load_function(criterion.function, setting=f"judge.criteria.{name}.function")
    return Parts(questions, prompts, functions)


def check_engine(settings: JudgeSettings, name: str, engine: Engine) -> None:
    """SettingsError if the criterion needs what its started engine can't do."""
    criterion, kind = settings.criteria[name], settings.kind(name)
    setting = f"judge.criteria.{name}"
    if kind != "likelihood" and criterion.verdict == "structured" and not engine.can_constrain:
        raise SettingsError(
            f"{setting}.verdict = 'structured' constrains answers to a pattern, which {engine.name} can't: "
            "use engine.kind = 'vllm', a vLLM endpoint, or verdict = 'answer'"
        )
    if (kind == "likelihood" or criterion.verdict == "labels") and not engine.can_score:
        raise SettingsError(
            f"{setting} compares log-probs of given tokens, which {engine.name} does not give: "
            f"use engine.kind = 'transformers'{'' if kind == 'likelihood' else ', or verdict = `answer`'}"
        )
    if settings.chat and not engine.has_chat_template:
        raise SettingsError(f"judge.chat = true, but {engine.name} has no chat template: set it to false")


def build_judge(
    settings: JudgeSettings,
    parts: Parts,
    *,
    engines: Mapping[str, Engine],
    readings: Mapping[str, TokenReading],
    classifiers: Mapping[str, Criterion],
) -> Judge:
    """All by criterion: its started engine, for `likelihood` also how texts become its tokens, and the started
    classifiers. SettingsError if they don't fit."""
    builder = _Builder(settings, parts, engines, readings, classifiers)
    return Judge(
        {name: builder.criterion(name) for name in settings.criteria},
        rules={name: Rule.of(criterion) for name, criterion in settings.criteria.items()},
        fingerprint=fingerprint(settings, parts, engines),
        token_criteria=frozenset(name for name, reading in readings.items() if reading.shares_policy_tokens),
    )


@dataclass
class _Builder:
    settings: JudgeSettings
    parts: Parts
    engines: Mapping[str, Engine]
    readings: Mapping[str, TokenReading]
    classifiers: Mapping[str, Criterion]
    askers: dict[int, Asker] = field(default_factory=dict)
    memory: VerdictMemory = field(init=False)
    encoding: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    def __post_init__(self) -> None:
        self.memory = VerdictMemory(self.settings.remembered_verdicts)

    def criterion(self, name: str) -> Criterion:
        kind, settings = self.settings.kind(name), self.settings.criteria[name]
        if kind == "python":
            place = f"judge.criteria.{name}.function"
            return PythonCriterion(self.parts.functions[name], self.settings.engine.timeout_s, setting=place)
        if kind == "classifier":
            return self.classifiers[name]
        check_engine(self.settings, name, self.engines[name])
        if kind == "likelihood":
            reading, cut = self.readings[name], self.settings.max_prefix_characters
            return Likelihood(self._asker(name), reading, settings.scale, cut)
        return self._prompted(name)

    def _prompted(self, name: str) -> Criterion:
        settings, question = self.settings.criteria[name], self.parts.questions[name]
        chat = self._is_chat(name)
        opens_answer = chat and settings.verdict == "labels"
        frame = Frame(self.parts.prompts[name], self.engines[name], chat=chat, opens_answer=opens_answer)
        prompted = Prompted(frame, self._source(name, question), self.settings.max_prefix_characters, self.encoding)
        if question.is_pairwise:
            tempers = TempersOfChunks(graded=prompted.source.grades)
            return Pairwise(name, prompted, settings.schedule, settings.budget, tempers)
        return Pointwise(prompted)

    def _source(self, name: str, question: Question) -> VerdictSource:
        settings, asker = self.settings.criteria[name], self._asker(name)
        if settings.verdict == "labels":
            values = [question.verdicts[label.strip()] for label in question.labels]
            return LabelVerdict(asker, self.memory, question.labels, values, adapter=settings.lora_adapter)
        thinking_end = self.settings.engine_of(name).thinking_end
        retries = self.settings.max_retries
        return AnswerVerdict(asker, self.memory, settings, question.verdicts, retries, thinking_end=thinking_end)

    def _asker(self, name: str) -> Asker:
        """One for each engine."""
        engine = self.engines[name]
        if id(engine) not in self.askers:
            max_at_once = self.settings.engine_of(name).max_queued_requests
            self.askers[id(engine)] = Asker(engine, max_at_once=max_at_once, patience_s=self.settings.engine_patience_s)
        return self.askers[id(engine)]

    def _is_chat(self, name: str) -> bool:
        chat = self.settings.chat
        return self.engines[name].has_chat_template if chat is None else chat


_SHAPES_ANSWERS = {"lora_adapter", "system_prompt", "chat_template_arguments", "thinking_end", "extra_body", "dtype"}
"""Settings of an engine that change what it answers, besides its name."""


def fingerprint(settings: JudgeSettings, parts: Parts, engines: Mapping[str, Engine]) -> str:
    """16 hex digits of SHA-256 over models, prompt texts, criteria settings and the user's source, not over addresses
    and limits. A model folder counts by its name: give other weights another name."""
    criteria = {
        name: criterion.model_dump(mode="json", exclude={"prompt", "engine"})
        | {"prompt": parts.prompts[name].text if name in parts.prompts else ""}
        | {"source": function_source(parts.functions[name]) if name in parts.functions else ""}
        | _engine_facts(settings, name, engines)
        for name, criterion in settings.criteria.items()
    }
    judge = {"chat": settings.chat, "max_prefix_characters": settings.max_prefix_characters, "criteria": criteria}
    return hashlib.sha256(json.dumps(judge, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _engine_facts(settings: JudgeSettings, name: str, engines: Mapping[str, Engine]) -> dict[str, Any]:
    if not settings.asks_model(name):
        return {}
    found = settings.engine_of(name).model_dump(mode="json", include=_SHAPES_ANSWERS)
    return {"model": engines[name].name, "engine": found}

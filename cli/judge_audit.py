"""`headwater judge-audit`: Measure a judge on pairs whose better text is known: originals against spoiled originals.

    documents --the run's windows and chunks--> originals --spoiled--> pairs --both orders--> figures by criterion

The judge is the one at judge.url, or the service in this process. Each criterion is asked alone, so that its calls and
seconds are its own, then all together for the reward that chooses. The judge decides which text it shows first; where
one order is missing, it is asked again with another seed.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.judge_access import MeasuredJudge, open_judge
from cli.judge_figures import CriterionFigures, PairAnswer, as_data, as_table, figures_of
from cli.run_folder import Overrides
from services.collector.sources.base import Refusal
from services.collector.sources.source import open_source
from services.collector.windows import PolicyTokenizer, Window, WindowMaker, WindowText
from services.known_pairs import SPOILINGS, KnownPair, Spoiling, spoil
from services.pair_questions import PairQuestion, Showing
from shared.api import JudgementFailure, JudgementRequest
from shared.configuration import load_secrets, load_settings
from shared.errors import HeadwaterError
from shared.records import Judgement
from shared.seeds import question_seed
from shared.settings import Secrets, Settings

if TYPE_CHECKING:
    from services.engine.base import Engine

REWARD = "reward"
"""All criteria together, as the run combines them."""
_MAX_ASKED = 6
"""Requests about one pair until both orders were shown."""

_DOCUMENTS = typer.Option(help="File, folder or glob of documents; format and fields as in the settings.")
_PAIRS = typer.Option(min=2, help="Pairs to ask about, as equally divided over the kinds of spoiling as can be.")
_LEAST = typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Exit 1 unless the accuracy is surely above this.")


def judge_audit(
    settings_file: Annotated[Path, typer.Argument(metavar="SETTINGS", help="TOML file with the [judge] section.")],
    overrides: Overrides,
    *,
    documents: Annotated[str, _DOCUMENTS],
    pairs: Annotated[int, _PAIRS] = 200,
    above: Annotated[float, _LEAST] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds within which the judge must be ready.")] = 1800.0,
) -> int:
    """0: the judge tells the pairs apart, 1: it does not, or it could not be asked."""
    settings = load_settings(settings_file, overrides)
    report = asyncio.run(audit_judge(settings, load_secrets(), documents=documents, num_pairs=pairs, timeout_s=timeout))
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_data(above=above), indent=2) + "\n", encoding="utf-8")
    print("\n".join(report.as_lines(above=above)))
    return 0 if report.is_above(above) else 1


@dataclass(frozen=True)
class AuditReport:
    documents: str
    model: str
    fingerprint: str
    criteria: tuple[CriterionFigures, ...]
    """The last one decides: the reward, or the only criterion."""

    def is_above(self, least: float) -> bool:
        """Whether the whole interval of the reward's accuracy is."""
        accuracy = self.criteria[-1].accuracy
        return bool(accuracy.number) and accuracy.interval[0] > least

    def as_data(self, *, above: float) -> dict[str, Any]:
        about = {"documents": self.documents, "model": self.model, "fingerprint": self.fingerprint, "above": above}
        return about | {
            "holds": self.is_above(above),
            "decided_by": self.criteria[-1].name,
            "criteria": {figures.name: as_data(figures) for figures in self.criteria},
        }

    def as_lines(self, *, above: float) -> list[str]:
        lines = [f"judge {self.fingerprint} ({self.model or 'no model'}) on pairs from {self.documents}", ""]
        lines += [*as_table(self.criteria), ""]
        for figures in self.criteria:
            if figures.unreadable or figures.num_failures:
                counted = [f"{number} {cause}" for cause, number in sorted(figures.unreadable.items())]
                missing = ", ".join(counted) or "none"
                lines.append(f"{figures.name}: unreadable: {missing}; {figures.num_failures} answers asked for again")
        word = "surely" if self.is_above(above) else "NOT surely"
        return [*lines, f"The accuracy of {self.criteria[-1].name} is {word} above {above:g}."]


async def audit_judge(
    settings: Settings,
    secrets: Secrets,
    *,
    documents: str,
    num_pairs: int,
    timeout_s: float,
    engine: "Engine | None" = None,
) -> AuditReport:
    """`engine` replaces that of the settings (tests)."""
    tokenizer = PolicyTokenizer(settings.policy.tokenizer_source)
    tasks = await asyncio.to_thread(make_tasks, settings, tokenizer, documents=documents, num_pairs=num_pairs)
    if not tasks:
        raise HeadwaterError(f"{documents} has no chunk that could be spoiled: give longer documents")
    async with open_judge(settings, secrets, timeout_s=timeout_s, engine=engine) as judge:
        asker = _Asker(judge, tokenizer)
        names = list(settings.judge.criteria)
        found = [await asker.figures(name, tasks) for name in [*names, *([REWARD] if len(names) > 1 else [])]]
        if not any(figures.accuracy.number for figures in found):
            causes = sum((Counter(figures.unreadable) for figures in found), Counter())
            raise HeadwaterError(f"the judge gave no verdict on any of {len(tasks)} pairs: {dict(causes)}")
        readiness = judge.readiness
    return AuditReport(documents, readiness.model, readiness.fingerprint, tuple(found))


@dataclass(frozen=True)
class Task:
    spoiling: Spoiling
    question: PairQuestion
    seed: int


def make_tasks(settings: Settings, tokenizer: PolicyTokenizer, *, documents: str, num_pairs: int) -> list[Task]:
    """One pair of each window, then a second one of each, until there are enough. Blocking."""
    windows = _windows(settings, tokenizer, documents=documents, limit=num_pairs)
    texts = [tokenizer.show(window.token_ids, window.chunks) for window in windows]
    random, used, tasks = Random(settings.run.seed), Counter[Spoiling](), list[Task]()
    places = [random.sample(range(len(window.chunks)), len(window.chunks)) for window in windows]
    others = [_text_of_another(number, windows, texts) for number in range(len(windows))]
    for turn in range(max(map(len, places), default=0)):
        for number, text in enumerate(texts):
            if len(tasks) == num_pairs or turn >= len(places[number]):
                continue
            index = places[number][turn]
            pair = _of_rarest_kind(text.suffix(index), random, used, other=others[number])
            if pair is not None:
                used[pair.spoiling] += 1
                span, first = text.spans[index], random.random() < 0.5
                question = PairQuestion(
                    text.text, span.start, span.end, pair.original, pair.spoiled, better_first=first
                )
                tasks.append(Task(pair.spoiling, question, question_seed(settings.run.seed, number, turn)))
    return tasks


def _windows(settings: Settings, tokenizer: PolicyTokenizer, *, documents: str, limit: int) -> list[Window]:
    """The first of the run's order that have a chunk."""
    about = settings.documents.model_copy(update={"path": documents, "num_parts": 1})
    source = open_source(about, seed=settings.run.seed, vocabulary_size=tokenizer.vocabulary_size)
    maker, found = WindowMaker(tokenizer, settings.chunks, settings.run.seed), list[Window]()
    for document in source.read(0, epoch=0, start=0):
        if not isinstance(document, Refusal):
            found += [window for window in maker.windows(document, part=0, epoch=0) if window.chunks]
        if len(found) >= limit:
            break
    return found[:limit]


def _text_of_another(number: int, windows: Sequence[Window], texts: Sequence[WindowText]) -> str:
    """Of the next window of another document; empty if there is none."""
    own = windows[number].key.position
    following = (*range(number + 1, len(windows)), *range(number))
    return next((texts[place].text for place in following if windows[place].key.position != own), "")


def _of_rarest_kind(text: str, random: Random, used: Counter[Spoiling], *, other: str) -> KnownPair | None:
    for spoiling in sorted(SPOILINGS, key=lambda kind: used[kind]):
        spoiled = spoil(text, spoiling, random=random, other=other)
        if spoiled is not None:
            return KnownPair(text, spoiled, spoiling)
    return None


@dataclass(frozen=True)
class _Asker:
    judge: MeasuredJudge
    tokenizer: PolicyTokenizer

    async def figures(self, name: str, tasks: Sequence[Task]) -> CriterionFigures:
        """Of one criterion, or of REWARD, over all pairs."""
        began = time.monotonic()
        answers = await self.judge.all_of([partial(self._answer, name, task) for task in tasks])
        return figures_of(name, answers, seconds=time.monotonic() - began)

    async def _answer(self, name: str, task: Task) -> PairAnswer:
        """Asks until a criterion that compares pairs has shown this one in both orders."""
        scored, showings, causes, num_calls, num_failures = None, list[Showing](), list[str](), 0, 0
        for turn in range(_MAX_ASKED):
            found = await self.judge.ask(partial(self._request, name, task, turn))
            num_calls, num_failures = num_calls + found.num_calls, num_failures + found.num_failures
            if isinstance(found, JudgementFailure):
                causes.append(found.reason)
                break
            if name == REWARD:
                scored = task.question.preference(found)
                break
            scored = task.question.preferred(_scores(found, name))
            showings += (shown := task.question.shown(found).get(name, []))
            if not shown or len({showing.better_first for showing in showings}) == 2:
                break
        return PairAnswer(task.spoiling, scored, tuple(showings), tuple(causes), num_calls, num_failures)

    def _request(self, name: str, task: Task, turn: int, with_token_ids: bool) -> JudgementRequest:
        return task.question.request(
            self.tokenizer.encode if with_token_ids else None,
            opening=self.tokenizer.opening,
            seed=question_seed(task.seed, turn) if turn else task.seed,
            criteria=() if name == REWARD else (name,),
        )


def _scores(found: Judgement, name: str) -> Sequence[float | None]:
    if name not in found.scores:
        raise HeadwaterError(
            f"the judge has no criterion {name!r}, it has {sorted(found.scores)}: give the settings that it runs with"
        )
    return found.scores[name]

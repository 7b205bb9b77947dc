"""A trickle of pairs whose better text is known, put to the judge beside the run's own questions. Called by parts.py.

    a judge.probe_share of windows, once scored --> spoiled: an original of the window against itself, spoiled
                                                --> base: an original against a rollout of weight version 0

Half of the probes are of each kind, as soon as there are recorded rollouts of the base policy: storage.py keeps the
first windows that have any, the database serves them to every collector and after every restart. The answers travel
with the window (`ScoredWindow.probes`) and are figures only: no probe is a candidate, and a probe that fails, or takes
too long, costs its window nothing but that time.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from random import Random

from services.collector.answers import RefusedRequestError
from services.collector.clients import JudgeClient
from services.collector.storage import BASE_VERSION, Storage
from services.collector.windows import PolicyTokenizer, Window, WindowText
from services.known_pairs import known_pair
from services.pair_questions import PairQuestion, is_consistent
from shared import metrics
from shared.api import JudgementFailure, JudgementRequest
from shared.errors import HeadwaterError
from shared.recordings import RecordedChunk, read_recorded
from shared.records import Judgement, Probe
from shared.seeds import seed_of, share_of
from shared.settings import Settings

BASE_WINDOWS = 32
"""Windows that each collector keeps for probes against the base policy."""
_BASE_CHUNKS = 256
"""Of them in use."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    question: PairQuestion
    probe: Probe
    """Without its answer."""


@dataclass
class Prober:
    settings: Settings
    judge: JudgeClient
    storage: Storage
    tokenizer: PolicyTokenizer
    _base: list[RecordedChunk] = field(default_factory=list)
    _num_wanted: int = 0
    _next_look: int = 1
    _before: tuple[str, str] = ("", "")
    """Document and text of the window before."""

    async def probe(self, window: Window, text: WindowText) -> tuple[Probe, ...]:
        """One probe, or none if the window is not drawn or has no text that can be spoiled. Never raises for a judge
        that can't answer."""
        (document, other), self._before = self._before, (window.source_id, text.text)
        if not probes_are_on(self.settings) or share_of(window.key, "probe") >= self.settings.judge.probe_share:
            return ()
        seed = seed_of(self.settings.run.seed, window.key, "probe")
        random = Random(seed)
        asked = await self._base_pair(random) if random.random() < 0.5 else None
        asked = asked or _spoiled_pair(text, random, other=other if document != window.source_id else "")
        if asked is None:
            return ()
        probe = await self._ask(asked, seed=seed)
        outcome = probe.reason or {1.0: "right", 0.0: "wrong"}.get(probe.value or 0.0, "tie")
        metrics.judge_probes_total.labels(probe.kind, outcome).inc()
        return (probe,)

    async def _base_pair(self, random: Random) -> _Asked | None:
        await self._look_for_base()
        pairs = [(chunk, made) for chunk in self._base if chunk.has_window for made in _base_texts(chunk)]
        if not pairs:
            return None
        chunk, made = random.choice(pairs)
        question = PairQuestion(
            chunk.text, chunk.text_start, chunk.text_end, chunk.original, made, better_first=random.random() < 0.5
        )
        return _Asked(question, Probe(kind="base", value=None))

    async def _look_for_base(self) -> None:
        """At the first call, the second, the fourth, ... until there is enough: other collectors record too."""
        self._num_wanted += 1
        if self._num_wanted < self._next_look or len(self._base) == _BASE_CHUNKS:
            return
        self._next_look = 2 * self._num_wanted
        run = self.storage.run
        self._base = await self.storage.in_database(
            read_recorded, run.database, run.name, limit=_BASE_CHUNKS, version=BASE_VERSION
        )

    async def _ask(self, asked: _Asked, *, seed: int) -> Probe:
        def request(with_token_ids: bool) -> JudgementRequest:
            encode = self.tokenizer.encode if with_token_ids else None
            return asked.question.request(encode, opening=self.tokenizer.opening, seed=seed)

        try:
            async with asyncio.timeout(self.settings.collector.request_timeout_s):
                (answer,) = (await self.judge.judge(request, document=str(seed))).judgements
                return _answered(asked, answer)
        except RefusedRequestError as exc:
            reason, why = exc.reason, str(exc)
        except TimeoutError:
            reason, why = "judge_unavailable", "no answer within collector.request_timeout_s"
        except (HeadwaterError, ValueError) as exc:
            reason, why = "judge_refused", str(exc)
        _log.warning("a known pair got no answer: %s", why, extra={"reason": reason})
        return asked.probe.model_copy(update={"reason": reason})


def probes_are_on(settings: Settings) -> bool:
    return settings.needs_judge and settings.judge.probe_share > 0


def _base_texts(chunk: RecordedChunk) -> list[str]:
    made = (one for one in chunk.candidates if one.weight_version == BASE_VERSION)
    return [one.text for one in made if one.text.strip() and one.text != chunk.original and "original" not in one.kinds]


def _spoiled_pair(text: WindowText, random: Random, *, other: str) -> _Asked | None:
    """Of one of the window's chunks, drawn at random, that can be spoiled."""
    for index in random.sample(range(len(text.spans)), len(text.spans)):
        pair = known_pair(text.suffix(index), random=random, other=other)
        if pair is not None:
            span = text.spans[index]
            first = random.random() < 0.5
            question = PairQuestion(text.text, span.start, span.end, pair.original, pair.spoiled, better_first=first)
            return _Asked(question, Probe(kind="spoiled", spoiling=pair.spoiling, value=None))
    return None


def _answered(asked: _Asked, answer: Judgement | JudgementFailure) -> Probe:
    value = asked.question.preference(answer)
    if isinstance(answer, JudgementFailure):
        return asked.probe.model_copy(update={"reason": answer.reason})
    if value is None:
        return asked.probe.model_copy(update={"reason": "unscored"})
    known = [found for shown in asked.question.shown(answer).values() if (found := is_consistent(shown)) is not None]
    return asked.probe.model_copy(update={"value": value, "consistent": all(known) if known else None})

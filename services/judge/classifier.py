"""The classifier criterion: a sequence classifier or reward model scores the candidates.

    criterion = Classifier("toxicity", settings, engine, max_prefix_characters=8_000)
    await criterion.start()                                # loads the model; torch is imported here
    (await criterion.score(chunk, seed=0, count=count)).values    # [0.98, 0.12, None]

With several classes a score is the probability of `label`; with one output it is sigmoid((output - mean of the chunk) /
scale).

A thread of its own owns the model. `score` puts a job on a bounded queue and never blocks the event loop; the thread
blocks in `_take` until there is one. Jobs of several chunks share batches, and cancelled ones leave the queue.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.judge.criteria import CriterionError, JudgedChunk, Scores
from services.judge.likelihood import scores_within_group
from services.judge.verdicts import CallCount
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, OverloadedError, SettingsError
from shared.judge_settings import CriterionSettings

if TYPE_CHECKING:
    from services.judge.classifier_model import ClassifierModel

# Out of memory, or a bug that these chunks trigger: the next ones may work.
_BATCH_ERRORS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_CLOSE_S = 10.0
_CHUNKS_AT_ONCE = 16
"""Jobs that share batches: rows of similar length are found among them."""


@dataclass(frozen=True, eq=False)
class _Job:
    prefix: str
    candidates: Sequence[str]
    future: "Future[list[float | None]]" = field(default_factory=Future)


class Classifier:
    """A criterion. `start` before the first score, `close` at the end."""

    def __init__(
        self, name: str, criterion: CriterionSettings, engine: EngineSettings, *, max_prefix_characters: int
    ) -> None:
        """`engine`: its device, dtype, batch size, queue and time limit."""
        self._criterion, self._timeout_s = criterion, engine.timeout_s
        self._max_prefix_characters = max_prefix_characters if criterion.sees_prefix else 0
        self._worker = _Worker(name, criterion, engine)

    async def start(self) -> None:
        """SettingsError if the model can't be loaded or `label` is none of its classes."""
        await asyncio.wrap_future(self._worker.start())

    async def close(self) -> None:
        await asyncio.to_thread(self._worker.close)

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        """OverloadedError if the queue is full, EngineError if the model fails or takes too long, CriterionError if no
        candidate has a finite output."""
        texts = chunk.distinct_texts
        job = _Job(chunk.end_of_prefix(self._max_prefix_characters), texts)
        self._worker.put(job)
        count.add_calls(len(texts))
        try:
            outputs = await asyncio.wait_for(asyncio.wrap_future(job.future), self._timeout_s)
        except TimeoutError as exc:
            late = f"gave no answer within engine.timeout_s = {self._timeout_s:g}"
            raise EngineError(f"the classifier {self._criterion.model} {late}") from exc
        output_of = dict(zip(texts, outputs, strict=True))
        return Scores(self._scores([output_of[text] for text in chunk.texts]))

    def _scores(self, outputs: list[float | None]) -> list[float | None]:
        if all(output is None for output in outputs):
            raise CriterionError("not_finite", f"the classifier {self._criterion.model} gave no finite output")
        return outputs if self._criterion.label else scores_within_group(outputs, scale=self._criterion.scale)


class _Worker:
    """The thread that owns the model, and its queue."""

    def __init__(self, name: str, criterion: CriterionSettings, engine: EngineSettings) -> None:
        self._name, self._criterion, self._engine = name, criterion, engine
        self._waiting: deque[_Job] = deque()
        self._closed = "the classifier has not started"
        self._changed = threading.Condition()
        """Guards the two above."""
        self._thread = threading.Thread(target=self._run, name=f"classifier-{name}", daemon=True)
        self._loaded: Future[None] = Future()

    def start(self) -> "Future[None]":
        """Done once the model is loaded."""
        self._closed = ""
        self._thread.start()
        return self._loaded

    def close(self) -> None:
        self._fail_all("the classifier is closed")
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    def put(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise EngineError(f"{self._closed}: judge.criteria.{self._name}")
            if len(self._waiting) >= self._engine.max_queued_requests:
                waiting = [other for other in self._waiting if not other.future.cancelled()]
                self._waiting = deque(waiting)
            if len(self._waiting) >= self._engine.max_queued_requests:
                found = f"{len(self._waiting)} chunks wait for the classifier {self._criterion.model}"
                raise OverloadedError(f"{found}, engine.max_queued_requests allows no more")
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        try:
            model = self._load()
        except BaseException as exc:
            self._fail_all("the classifier could not be loaded")
            self._loaded.set_exception(exc)
            if not isinstance(exc, SettingsError):
                raise
            return
        self._loaded.set_result(None)
        try:
            while jobs := self._take():
                self._answer(model, jobs)
        finally:
            self._fail_all("the classifier has stopped: restart the judge")

    def _load(self) -> "ClassifierModel":
        from services.judge.classifier_model import load_classifier  # torch: only judges with a classifier need it

        return load_classifier(self._name, self._criterion.model, label=self._criterion.label, settings=self._engine)

    def _take(self) -> list[_Job]:
        """The oldest jobs that somebody waits for; empty once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return []
                taken: list[_Job] = []
                while self._waiting and len(taken) < _CHUNKS_AT_ONCE:
                    job = self._waiting.popleft()
                    if job.future.set_running_or_notify_cancel():
                        taken.append(job)
                if taken:
                    return taken

    def _answer(self, model: "ClassifierModel", jobs: Sequence[_Job]) -> None:
        try:
            answers = self._answers(model, jobs)
        except BaseException as exc:
            for job in jobs:
                job.future.set_exception(EngineError(f"the classifier {self._criterion.model} failed: {exc!r}"))
            if not isinstance(exc, _BATCH_ERRORS):
                raise
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)

    def _answers(self, model: "ClassifierModel", jobs: Sequence[_Job]) -> list[list[float | None]]:
        found = [model.rows(job.prefix, job.candidates) for job in jobs]
        metrics.judge_cut_candidates_total.labels(self._name).inc(sum(num_cut for _, num_cut in found))
        rows = [row for of_job, _ in found for row in of_job]
        outputs = iter(model.outputs([row for row in rows if row]))
        return [[next(outputs) if row else None for row in of_job] for of_job, _ in found]

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineError(reason))

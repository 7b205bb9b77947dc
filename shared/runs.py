"""The records of one run in the database. Every process opens its run here.

    run = open_run(settings)                                    # connect, migrate, write or compare the run's row
    run.record_event("trainer", "started", "at step 0")
    run.record_step(1, StepFigures(at=time.time(), weight_version=1, figures={"loss": 0.69}))
    run.ledger.next_position(part=0)                            # its windows: shared/ledger.py

`headwater audit`, `report` and `check` only look: `reading_run` neither migrates nor writes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from shared.checkpoint_state import StepFigures
from shared.comparisons import rows
from shared.configuration import without_passwords
from shared.database import (
    CandidateRow,
    ChunkRow,
    EventRow,
    RunRow,
    StepRow,
    WeightVersionRow,
    WindowTextRow,
    insert_if_absent,
    migrate,
    open_database,
    storable,
    transaction,
    translated,
)
from shared.errors import HeadwaterError
from shared.identity import Manifest, refuse_changed_identity, refuse_changed_source, refuse_other_form
from shared.ledger import Ledger
from shared.records import FORM, Lease, ScoredChunk, ScoredWindow
from shared.settings import Settings


def open_run(settings: Settings) -> "Run":
    """The run, ready to be written. Raises SettingsError if it has another form or identity, DatabaseError if the
    database is away: then call it again."""
    run = Run.of(settings)
    try:
        run.open(settings)
    except BaseException:
        run.close()
        raise
    return run


@contextmanager
def reading_run(settings: Settings) -> Iterator["Run"]:
    """An existing run, to look at. Raises SettingsError if it has another form, HeadwaterError if it isn't there."""
    run = Run.of(settings)
    try:
        if run.began_with() is None:
            raise HeadwaterError(f"run {run.name!r} is not in its database: no process of it has started yet")
        yield run
    finally:
        run.close()


@dataclass(frozen=True)
class RunStart:
    settings: dict[str, Any]
    source: dict[str, Any] | None
    """`Manifest.stored` of its documents; None until a collector has opened them."""


@dataclass(frozen=True)
class ShownText:
    """A window's text as the judge saw it."""

    text: str
    spans: Mapping[int, tuple[int, int]]
    """By a chunk's `start` in tokens, where its suffix lies in `text`, in characters."""


@dataclass(frozen=True)
class Run:
    """One run in its database. Blocking: use it from a thread in async code."""

    database: sa.Engine
    name: str
    lease: Lease | None = None
    """The trainer's: its writes raise FencedError, and change nothing, once another trainer has taken over."""

    @classmethod
    def of(cls, settings: Settings) -> "Run":
        return cls(open_database(settings.database_url), settings.run.name)

    def open(self, settings: Settings) -> None:
        """Bring the schema up to date and write the run's row, or compare with it. Raises as `open_run` does."""
        self.began_with()  # refuses another form before the migration: the version that can finish the run still may
        migrate(self.database)
        now = without_passwords(settings).model_dump(mode="json")
        with transaction(self.database) as session:
            insert_if_absent(session, RunRow, id=self.name, created_at=time.time(), form=FORM, settings=now)
            then = session.scalars(sa.select(RunRow.settings).where(RunRow.id == self.name)).one()
        refuse_changed_identity(then, now, run=f"{self.name!r} of this database")

    def began_with(self) -> RunStart | None:
        """None if the database does not have the run. Raises SettingsError if it has another form. Reads older schemas
        too, and writes nothing."""
        with translated():
            inspector = sa.inspect(self.database)
            if not inspector.has_table(RunRow.__tablename__):
                return None
            columns = {column["name"] for column in inspector.get_columns(RunRow.__tablename__)}
        form = RunRow.form if "form" in columns else sa.literal(1)
        source = RunRow.source if "source" in columns else sa.null()
        with transaction(self.database) as session:
            found = session.execute(sa.select(RunRow.settings, source, form).where(RunRow.id == self.name)).first()
        if found is None:
            return None
        refuse_other_form(found[2], run=self.name)
        return RunStart(found[0], found[1])

    def close(self) -> None:
        self.database.dispose()

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.database, self.name, self.lease)

    def under(self, lease: Lease) -> "Run":
        """The same run, written by the trainer that holds `lease`."""
        return replace(self, lease=lease)

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with transaction(self.database) as session:
            self.ledger.refuse_if_fenced(session, self.lease)
            yield session

    def adopt_source(self, manifest: Manifest) -> None:
        """Keep what the run's documents are; SourceError if others are kept."""
        of_run = sa.update(RunRow).where(RunRow.id == self.name)
        with transaction(self.database) as session:
            session.execute(of_run.where(RunRow.source.is_(sa.null())).values(source=manifest.stored()))
            kept = session.scalars(sa.select(RunRow.source).where(RunRow.id == self.name)).one()
        refuse_changed_source(kept, manifest, run=self.name)

    def extent(self, *, max_epochs: int) -> str:
        """What a start of the run reads: how many epochs of which documents. A part's end holds for one extent."""
        with transaction(self.database) as session:
            digest = session.scalar(sa.select(RunRow.source["digest"].as_string()).where(RunRow.id == self.name))
        return f"{max_epochs} epochs of documents {digest}"

    def record_event(self, role: str, kind: str, message: str, **data: Any) -> None:
        with self._writing() as session:
            session.add(EventRow.of(self.name, role, kind, message, **data))

    def record_step(self, step: int, row: StepFigures) -> None:
        with self._writing() as session:  # merge replaces the row that the step may have
            session.merge(StepRow(run_id=self.name, step=step, **row.model_dump()))

    def delete_steps_beyond(self, step: int) -> None:
        with self._writing() as session:
            session.execute(sa.delete(StepRow).where(StepRow.run_id == self.name, StepRow.step > step))

    def newest_step(self) -> int:
        """The last one with a row; 0 if there is none."""
        newest = sa.select(sa.func.max(StepRow.step)).where(StepRow.run_id == self.name)
        with transaction(self.database) as session:
            return session.scalar(newest) or 0

    def figures(self) -> list[dict[str, float]]:
        """Of all steps with a row, in their order."""
        rows = sa.select(StepRow.figures).where(StepRow.run_id == self.name).order_by(StepRow.step)
        with transaction(self.database) as session:
            return list(session.scalars(rows))

    def published_steps(self) -> dict[int, int]:
        """Weight version -> the step after which it was published."""
        published = sa.select(WeightVersionRow.version, WeightVersionRow.step)
        with transaction(self.database) as session:
            rows = session.execute(published.where(WeightVersionRow.run_id == self.name)).all()
        return {row.version: row.step for row in rows}

    def newest_weight_version(self) -> int | None:
        newest = sa.select(sa.func.max(WeightVersionRow.version)).where(WeightVersionRow.run_id == self.name)
        with transaction(self.database) as session:
            return session.scalar(newest)

    def record_version(
        self, version: int, *, step: int, form: str, num_bytes: int, seconds: float, created_at: float
    ) -> None:
        """`seconds` is what publishing took. Replaces the row that the version may have."""
        row = WeightVersionRow(run_id=self.name, version=version, step=step, form=form, num_bytes=num_bytes)
        row.seconds, row.created_at = seconds, created_at
        with self._writing() as session:
            session.merge(row)

    def record_chunks(
        self, window: ScoredWindow, prefixes: Sequence[str], lease: Lease, *, shown: "ShownText | None" = None
    ) -> None:
        """All chunks and candidates, with a prefix to show for each scored chunk; with `shown` what another judge needs
        to be asked the same (shared/recordings.py). Replaces the rows of an earlier attempt. FencedError as the ledger.
        """
        earlier = sa.select(ChunkRow.id).where(ChunkRow.run_id == self.name, ChunkRow.window_id == window.window_id)
        with transaction(self.database) as session:
            self.ledger.refuse_if_fenced(session, lease)
            session.execute(sa.delete(CandidateRow).where(CandidateRow.chunk_id.in_(earlier)))
            session.execute(sa.delete(ChunkRow).where(ChunkRow.id.in_(earlier)))
            for chunk, prefix in zip(window.chunks, prefixes, strict=True):
                about = _judged(chunk) | _shown(chunk.start, window, shown)
                row = self._chunk_row(window, chunk.start, **about, prefix=storable(prefix))
                session.add(row)
                session.flush()
                session.add_all(_candidate_rows(chunk, row.id))
            for lost in window.dropped_chunks:
                session.add(self._chunk_row(window, lost.start, prefix="", dropped_reason=storable(lost.reason)))
            if shown is not None:
                session.merge(WindowTextRow(run_id=self.name, window_id=window.window_id, text=storable(shown.text)))

    def _chunk_row(self, window: ScoredWindow, start: int, **values: Any) -> ChunkRow:
        about = {"run_id": self.name, "window_id": window.window_id, "scored_at": window.scored_at}
        return ChunkRow(start=start, **about, **values)


def _judged(chunk: ScoredChunk) -> dict[str, Any]:
    if chunk.judgement is None:
        return {}
    figures = chunk.judgement.model_dump(include={"fingerprint", "num_calls", "num_failures"})
    compared = rows(chunk.judgement.comparisons) or None
    return figures | {"reasoning": storable(chunk.judgement.reasoning), "comparisons": compared}


def _shown(start: int, window: ScoredWindow, shown: "ShownText | None") -> dict[str, Any]:
    seconds = window.seconds.get("judge")
    found: dict[str, Any] = {} if seconds is None else {"judge_seconds": seconds / len(window.chunks)}
    if shown is None:
        return found
    text_start, text_end = shown.spans[start]
    return found | {"text_start": text_start, "text_end": text_end}


def _candidate_rows(chunk: ScoredChunk, chunk_id: int) -> list[CandidateRow]:
    judgement = chunk.judgement
    return [
        CandidateRow(
            chunk_id=chunk_id,
            kinds=",".join(candidate.kinds),
            text=storable(candidate.text),
            num_tokens=len(candidate.token_ids),
            weight_version=candidate.weight_version,
            reward=judgement.rewards[index] if judgement else None,
            barred=judgement is not None and index in judgement.barred,
            scores={name: scores[index] for name, scores in judgement.scores.items()} if judgement else {},
        )
        for index, candidate in enumerate(chunk.candidates)
    ]

"""The records of a run, each on SQLite and on PostgreSQL; and which runs are refused."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from shared.checkpoint_state import StepFigures
from shared.database import (
    CandidateRow,
    ChunkRow,
    EventRow,
    RunRow,
    StepRow,
    WeightVersionRow,
    migrate,
    open_database,
    transaction,
)
from shared.errors import FencedError, HeadwaterError, SettingsError, SourceError
from shared.identity import Manifest
from shared.records import FORM, Comparison, DroppedChunk, Lease
from shared.runs import Run, RunStart, open_run, reading_run
from shared.settings import Settings
from tests.shared.scored import scored_window

OpenAgain = Callable[..., Run]
GIB = 2**30


def settings_of(database: sa.Engine, **sections: dict[str, Any]) -> Settings:
    url = database.url.render_as_string(hide_password=False)
    defaults = {"database": {"url": url}, "documents": {"path": "a"}, "run": {"name": "web", "seed": 3}}
    return Settings.model_validate({**defaults, **sections})


@pytest.fixture
def open_again(database: sa.Engine) -> Iterator[OpenAgain]:
    """Opens runs in the test's database, and closes them after the test: the server waits for its clients."""
    opened: list[Run] = []

    def open_one(**sections: dict[str, Any]) -> Run:
        opened.append(open_run(settings_of(database, **sections)))
        return opened[-1]

    yield open_one
    for run in opened:
        run.close()


@pytest.fixture
def run(open_again: OpenAgain) -> Run:
    return open_again()


def column(run: Run, found: Any) -> Sequence[Any]:
    with transaction(run.database) as session:
        return session.scalars(sa.select(found)).all()


def test_a_run_is_opened_once_and_its_first_settings_are_kept(open_again: OpenAgain, run: Run) -> None:
    began_with = run.began_with()
    open_again(trainer={"steps": 7})
    assert run.began_with() == began_with
    assert began_with is not None
    assert began_with.settings["trainer"]["steps"] == 2000
    assert column(run, RunRow.form) == [FORM]


def test_no_password_is_kept(open_again: OpenAgain) -> None:
    run = open_again(redis={"url": "redis://me:hUsh@host/0"})
    assert "hUsh" not in str(run.began_with())


@pytest.mark.parametrize("changed", [{"num_parts": 2}, {"path": "b"}, {"shuffle_bytes": 5}])
def test_another_identity_is_refused(open_again: OpenAgain, run: Run, changed: dict[str, object]) -> None:
    open_again(documents={"path": "a", "max_epochs": 4})
    with pytest.raises(SettingsError, match=rf"documents\.{next(iter(changed))} was .* Put them back, or start a new"):
        open_again(documents={"path": "a"} | changed)


OLD_ROWS = (
    "INSERT INTO runs (id, created_at, settings) VALUES ('web', 0, '{}')",
    "INSERT INTO documents VALUES ('web', 0, 0, 0, 0, 'd', 'scored', '', '', 32, 3, 1, 2, NULL, 1.0, NULL, 0, 1, NULL)",
)
REFUSED = "run 'web' was begun by an earlier version of Headwater.*or start a new run with --run.name NAME"


def test_a_run_of_an_earlier_form_is_refused_and_its_database_left_alone(database_url: str) -> None:
    database = open_database(database_url)
    migrate(database, revision="0002")
    with database.begin() as connection:
        for row in OLD_ROWS:
            connection.exec_driver_sql(row)
    settings = settings_of(database)
    with pytest.raises(SettingsError, match=REFUSED):
        open_run(settings)
    with pytest.raises(SettingsError, match=REFUSED), reading_run(settings):
        pass
    assert sa.inspect(database).has_table("documents")
    other = open_run(settings.model_copy(update={"run": settings.run.model_copy(update={"name": "new"})}))
    assert other.ledger.balance().read == 0
    with pytest.raises(SettingsError, match=REFUSED):
        open_run(settings)
    other.close()
    database.dispose()


def test_a_run_of_a_later_form_is_refused(open_again: OpenAgain, run: Run) -> None:
    with transaction(run.database) as session:
        session.execute(sa.update(RunRow).values(form=FORM + 1))
    with pytest.raises(SettingsError, match="begun by a later version of Headwater"):
        open_again()


def test_a_run_that_is_not_there_is_not_read(database_url: str) -> None:
    """Nothing is migrated either."""
    database = open_database(database_url)
    with pytest.raises(HeadwaterError, match="run 'web' is not in its database"), reading_run(settings_of(database)):
        pass
    assert sa.inspect(database).get_table_names() == []
    database.dispose()


def test_the_first_manifest_is_kept_and_others_are_refused(run: Run) -> None:
    first = Manifest({"a": 1}, {"num_rows": 5})
    run.adopt_source(first)
    run.adopt_source(first)
    start = run.began_with()
    assert isinstance(start, RunStart)
    assert start.source == first.stored()
    for other, words in (
        (Manifest({"a": 1, "b": 2}, {"num_rows": 5}), r"1 file was added \(b\)"),
        (Manifest({"a": 1}, {"num_rows": 6}), "num_rows was 5 and is now 6"),
    ):
        with pytest.raises(SourceError, match=words):
            run.adopt_source(other)


def test_an_extent_tells_epochs_and_documents_apart(open_again: OpenAgain, run: Run) -> None:
    other = open_again(run={"name": "other"})
    before = run.extent(max_epochs=1)
    run.adopt_source(Manifest({"a": 1}))
    other.adopt_source(Manifest({"a": 2}))
    found = [before, run.extent(max_epochs=1), run.extent(max_epochs=2), other.extent(max_epochs=1)]
    assert len(set(found)) == 4
    assert run.extent(max_epochs=2) == found[2]


def test_events_are_kept_without_secrets_and_unstorable_characters(run: Run) -> None:
    run.record_event("trainer", "resumed", "at step 4", step=4)
    run.record_event("rollout", "refused_weights", "no s3://id:hUsh@bucket/run: caf\udce9 \x00")
    with transaction(run.database) as session:
        first, second = session.scalars(sa.select(EventRow).order_by(EventRow.id)).all()
        assert (first.role, first.kind, first.message, first.data) == ("trainer", "resumed", "at step 4", {"step": 4})
        assert second.message == "no s3://bucket/run: caf\\udce9 \ufffd"


def test_a_step_redone_replaces_its_row_and_steps_beyond_a_checkpoint_go(run: Run) -> None:
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.6)):
        run.record_step(step, StepFigures(at=1.0, weight_version=step, figures={"loss": loss}))
    run.delete_steps_beyond(2)
    assert column(run, StepRow.figures) == [{"loss": 0.5}, {"loss": 0.6}]


def test_the_newest_weight_version_is_known(database: sa.Engine, run: Run) -> None:
    assert run.newest_weight_version() is None
    for one, version in ((run, 11), (run, 4), (Run(database, "other"), 30)):
        one.record_version(version, step=version, form="full", num_bytes=20 * GIB, seconds=0.5, created_at=1.0)
    assert run.newest_weight_version() == 11
    assert set(column(run, WeightVersionRow.num_bytes)) == {20 * GIB}


def test_chunks_of_an_earlier_attempt_are_replaced_under_the_lease_only(run: Run) -> None:
    first, second = (Lease(0, owner, run.ledger.take_part(0, after=after)) for after, owner in enumerate("ab"))
    with pytest.raises(FencedError):
        run.record_chunks(scored_window(), ["p"], first)
    run.record_chunks(scored_window(text=" early"), ["p"], second)
    lost = DroppedChunk(start=3, reason="judge_refused")
    run.record_chunks(scored_window().model_copy(update={"dropped_chunks": (lost,)}), ["the\x00 p"], second)
    with transaction(run.database) as session:
        scored, dropped = session.scalars(sa.select(ChunkRow).order_by(ChunkRow.start)).all()
        assert (scored.window_id, scored.start, scored.prefix, scored.num_calls) == ("0.0.0.0", 2, "the\ufffd p", 2)
        assert (dropped.start, dropped.dropped_reason, dropped.num_calls) == (3, "judge_refused", 0)
        candidates = session.scalars(sa.select(CandidateRow).order_by(CandidateRow.id)).all()
        assert [(one.kinds, one.text, one.weight_version, one.reward, one.scores) for one in candidates] == [
            ("original", " river", None, 0.75, {"quality": 0.75}),
            ("rollout", " hill", 2, 0.25, {"quality": 0.25}),
        ]


def test_comparisons_bars_and_missing_scores_are_recorded(run: Run) -> None:
    lease, window = Lease(0, "a", run.ledger.take_part(0, after=0)), scored_window()
    (chunk,) = window.chunks
    assert chunk.judgement is not None
    compared = (
        Comparison(criterion="quality", first=1, second=0, value=0.25),
        Comparison(criterion="quality", first=0, second=1, value=None),
    )
    update = {"rewards": (None, 0.25), "scores": {"quality": (None, 0.25)}, "barred": (1,), "comparisons": compared}
    judged = chunk.model_copy(update={"judgement": chunk.judgement.model_copy(update=update)})
    others = [chunk.model_copy(update={"start": 3}), chunk.model_copy(update={"start": 4, "judgement": None})]
    run.record_chunks(window.model_copy(update={"chunks": (judged, *others)}), ["p"] * 3, lease)
    with transaction(run.database) as session:
        found = session.scalars(sa.select(ChunkRow.comparisons).order_by(ChunkRow.start)).all()
        assert found == [[["quality", 1, 0, 0.25], ["quality", 0, 1, None]], None, None]
        assert session.scalar(sa.select(sa.func.count()).where(ChunkRow.comparisons.is_(sa.null()))) == 2
        candidates = session.scalars(sa.select(CandidateRow).order_by(CandidateRow.id)).all()
        assert [(one.reward, one.barred) for one in candidates[:2]] == [(None, False), (0.25, True)]
        assert not any(one.barred for one in candidates[2:])


def test_ids_of_recorded_candidates_go_beyond_32_bits(run: Run) -> None:
    lease = Lease(0, "a", run.ledger.take_part(0, after=0))
    with transaction(run.database) as session:
        session.add(ChunkRow(id=2**31 - 1, run_id="web", window_id="9.0.0.0", start=8, prefix="p", scored_at=1.0))
        if run.database.dialect.name == "postgresql":
            for table in ("chunks", "candidates"):
                session.execute(sa.text(f"SELECT setval('{table}_id_seq', {2**31 - 1})"))
    run.record_chunks(scored_window(), ["p"], lease)
    assert max(column(run, CandidateRow.chunk_id)) == 2**31

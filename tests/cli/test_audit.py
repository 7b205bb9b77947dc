"""The audit holds for an honest run, and names each kind of contradiction."""

import json

import pytest
import sqlalchemy as sa

from cli.audit import AuditResult, audit, audit_run
from cli.plan import REDIS_HOST, Ports, child_environ, redis_url
from cli.processes import Child
from cli.stack import find_redis_server, server_configuration, wait_until_it_answers
from shared.checkpoint_state import Evidence
from shared.coordination import Coordination
from shared.database import WindowRow, transaction
from shared.records import WindowKey
from shared.redis import connect
from shared.stream import WindowStream
from tests.cli.conftest import MadeRun, key


def _honest(made: MadeRun) -> None:
    """Two windows trained, one dropped, one being read."""
    made.read(key(0), key(0, window=1), key(1), key(2))
    made.score(key(0), key(0, window=1))
    made.ledger.drop(key(1), reason="not_json")
    made.train(1, "0.0.0.0")
    made.train(2, "0.0.0.1")


def _fails(result: AuditResult) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.outcome == "fails"}


def _audit(made: MadeRun) -> AuditResult:
    return audit_run(made.engine, made.settings, made.folder)


def _outcomes(made: MadeRun) -> dict[str, str]:
    return {check.name: check.outcome for check in _audit(made).checks}


def test_an_honest_run_balances(made: MadeRun) -> None:
    _honest(made)
    result = _audit(made)
    assert _fails(result) == {}
    assert (result.read, result.balance.trained, result.balance.in_flight) == (4, 2, 1)
    assert result.balance.dropped == {"not_json": 1}
    assert result.equation == "4 windows read = 2 trained + 1 dropped + 1 in flight"


def test_an_empty_run_balances(made: MadeRun) -> None:
    assert set(_outcomes(made).values()) == {"holds"}


def test_the_equation_has_two_sides(made: MadeRun) -> None:
    """What was read is known from cursors and numbers of windows, not from the rows that are added up."""
    _honest(made)
    with transaction(made.engine) as session:
        session.execute(sa.delete(WindowRow).where(WindowRow.window == 1))
    result = _audit(made)
    assert result.equation == "4 windows read is NOT 1 trained + 1 dropped + 1 in flight"
    assert "documents are conserved" in _fails(result)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ((key(0), key(2)), "document 0.0.1 has no row: part 0, epoch 0 was read up to position 2"),
        ((key(0), key(0, epoch=2)), "part 0 was read in epochs [0, 2]"),
    ],
)
def test_what_was_jumped_over_is_found(made: MadeRun, keys: tuple[WindowKey, ...], problem: str) -> None:
    made.read(*keys)
    assert problem in str(_fails(_audit(made)))


def test_a_document_in_two_checkpoints_is_found(made: MadeRun) -> None:
    _honest(made)
    made.step(3, pairs=1)
    made.checkpoint(3, {"0.0.0.0": 1})
    assert "window 0.0.0.0 was finished by two checkpoints, of steps 1 and 3" in str(_fails(_audit(made)))


def test_the_newest_checkpoint_may_be_a_moment_ahead(made: MadeRun) -> None:
    """Its trainer died before it told the ledger, and will do so at its next start."""
    _honest(made)
    made.score(key(2))
    _put_on_stream(made, "0.0.2.0")
    made.step(3, pairs=1)
    made.checkpoint(3, {"0.0.2.0": 3})
    assert _fails(_audit(made)) == {}
    made.run.record_event("trainer", "finished", "finished at step 3", step=3, source_ended=False)
    assert "window 0.0.2.0 is scored, the checkpoint of step 3 says trained" in str(_fails(_audit(made)))


def test_an_older_checkpoint_may_not(made: MadeRun) -> None:
    _honest(made)
    made.step(3, pairs=1)
    made.checkpoint(3, {"0.0.2.0": 3})
    made.step(4, pairs=0)
    made.checkpoint(4, {})
    assert "window 0.0.2.0 is reading, the checkpoint of step 3 says trained" in str(_fails(_audit(made)))


def test_a_checkpoint_may_be_a_moment_ahead_of_its_evidence(made: MadeRun) -> None:
    _honest(made)
    made.step(3, pairs=1)
    before = made.evidence.path.read_text()
    made.checkpoint(3, {"0.0.2.0": 3})
    made.evidence.path.write_text(before)
    assert _fails(_audit(made)) == {}


def test_the_row_that_a_checkpoint_carries_is_not_missed(made: MadeRun) -> None:
    """The database was away when the trainer ended; the next start writes it."""
    _honest(made)
    made.checkpoint(3, {})
    assert "step 3 has no row" in str(_fails(_audit(made)))
    path = made.folder.checkpoints / "step-00000003/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"row": {"at": 1.0, "weight_version": 3, "figures": {}}}))
    assert _fails(_audit(made)) == {}


def test_an_update_of_another_checkpoint_is_found(made: MadeRun) -> None:
    """The windows of update 2 belong into the checkpoint of step 2."""
    _honest(made)
    made.step(3, pairs=0)
    made.checkpoint(3, {"0.0.2.0": 2})
    expected = "window 0.0.2.0 is in update 2 by the checkpoint of step 3, which begins after step 2"
    assert expected in str(_fails(_audit(made)))


def test_a_window_is_dropped_as_non_finite_only_by_a_step_that_was_skipped(made: MadeRun) -> None:
    _honest(made)
    made.ledger.drop(key(2), reason="non_finite_loss")
    assert "window 0.0.2.0 is dropped as non_finite_loss, no skipped step had it" in str(_fails(_audit(made)))
    made.run.record_event("trainer", "skipped_step", "step 3 skipped", step=3, windows=["0.0.2.0"])
    assert _fails(_audit(made)) == {}


def test_a_document_nobody_read_is_found(made: MadeRun) -> None:
    made.train(1, "0.0.7.0")
    assert "window 0.0.7.0 is in the checkpoint of step 1 and has no row" in str(_fails(_audit(made)))


def test_a_checkpoint_that_was_deleted_to_go_on_without_it_is_named(made: MadeRun) -> None:
    """What the next start then writes has its number again."""
    _honest(made)
    made.evidence.append(Evidence(number=2, after=1, step=3, finished={}))
    assert "checkpoint number 2 has a second line (step 3)" in str(_fails(_audit(made)))


def test_nothing_may_be_in_flight_when_the_source_has_ended(made: MadeRun) -> None:
    _honest(made)
    made.run.record_event("trainer", "finished", "finished at step 2", step=2, source_ended=False)
    assert _fails(_audit(made)) == {}
    made.run.record_event("trainer", "finished", "the source ended", step=2, source_ended=True)
    assert "window 0.0.2.0 is reading, though the source had ended" in str(_fails(_audit(made)))
    made.run.record_event("trainer", "resumed", "with more epochs")
    assert _fails(_audit(made)) == {}


def _put_on_stream(made: MadeRun, *documents: str, leased: tuple[int, ...] = ()) -> None:
    """Through an embedded Redis that is killed afterwards, as at the end of a run that failed."""
    with Ports() as ports:
        port = ports.take(REDIS_HOST, 0)
        log = made.folder.log("redis")
        server = Child("redis", [find_redis_server(), "-"], log=log, environ=child_environ())
        server.start(standard_input=server_configuration(made.folder.redis, port=port, password="p"))
        url = redis_url(port, "p")
        wait_until_it_answers(url, timeout_s=30.0, alive=lambda: server.is_running)
        client = connect(url, timeout_s=5.0)
        stream = WindowStream(client, "made")
        for document in documents:
            stream.append(document, b"", lease=None)
        held = Coordination(client, "made").acquire_leases(leased, "collector", room=len(leased), lease_s=60)
        assert held == list(leased)
        client.close()
        server.kill()


def test_windows_being_read_need_a_collector_where_any_works(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none works they are simply in flight."""
    monkeypatch.setattr("cli.audit.RECHECK_S", 0.0)
    collector = made.settings.collector.model_copy(update={"lease_s": 0.3})
    documents = made.settings.documents.model_copy(update={"num_parts": 2})
    made.settings = made.settings.model_copy(update={"collector": collector, "documents": documents})
    name = "where collectors work, windows being read are in their hands"
    made.read(key(0))
    (check,) = [check for check in _audit(made).checks if check.name == name]
    assert (check.outcome, check.detail) == ("holds", "1 in flight, no collector works")
    _put_on_stream(made, leased=(1,))
    assert _fails(_audit(made)) == {name: "window 0.0.0.0 is being read, and no collector leases part 0"}
    _put_on_stream(made, leased=(0,))
    assert _outcomes(made)[name] == "holds"


def test_what_only_one_look_sees_is_no_contradiction(made: MadeRun) -> None:
    """A part that is free for a moment has its collector when the audit looks again."""
    documents = made.settings.documents.model_copy(update={"num_parts": 2})
    made.settings = made.settings.model_copy(update={"documents": documents})
    made.read(key(0))
    _put_on_stream(made, leased=(1,))
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        _put_on_stream(made, leased=(0,))

    assert _fails(audit_run(made.engine, made.settings, made.folder, wait=wait)) == {}
    assert waited == [made.settings.collector.lease_s / 3 + 1.0]


def test_scored_documents_are_looked_up_in_a_copy_of_the_redis_file(made: MadeRun) -> None:
    made.read(key(0), key(1))
    made.score(key(0), key(1))
    _put_on_stream(made, "0.0.0.0")
    before = {path: path.read_bytes() for path in made.folder.redis.rglob("*") if path.is_file()}
    assert _fails(_audit(made)) == {"scored windows are on the stream": "window 0.0.1.0 is not on the stream"}
    assert {path: path.read_bytes() for path in made.folder.redis.rglob("*") if path.is_file()} == before


def test_an_unreachable_redis_is_said_and_not_guessed(made: MadeRun) -> None:
    made.read(key(0))
    made.score(key(0))
    remote = made.settings.redis.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    made.settings = made.settings.model_copy(update={"redis": remote})
    (check,) = [check for check in _audit(made).checks if check.name == "scored windows are on the stream"]
    assert check.outcome == "not checked"
    assert "127.0.0.1:1" in check.detail


def test_the_command_prints_json_and_tells_by_its_exit_code(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    _honest(made)
    assert audit(str(made.folder.path), as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["read"], data["trained"], data["dropped"], data["holds"]) == (4, 2, {"not_json": 1}, True)
    made.read(key(9))
    assert audit(str(made.folder.path), as_json=False) == 1
    assert "fails        every position of each part has its document" in capsys.readouterr().out

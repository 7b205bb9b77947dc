"""The audit holds for an honest run, and names each kind of contradiction."""

import json

import pytest
import sqlalchemy as sa

from cli.audit import AuditResult, audit, audit_run
from cli.plan import child_environ
from cli.ports import Ports
from cli.processes import Child
from cli.redis_server import HOST, find_redis_server, redis_url, server_configuration, wait_until_it_answers
from shared.database import DocumentRow, transaction
from shared.stream import DocumentStream, connect
from tests.cli.conftest import MadeRun, key


def _honest(made: MadeRun) -> None:
    """Two trained in one checkpoint, one dropped, one being read."""
    made.read(key(0), key(0, window=1), key(1), key(2))
    made.score(key(0), key(0, window=1))
    made.ledger.mark_trained({"0.0.0.0": 1, "0.0.0.1": 2})
    made.ledger.drop(key(1), reason="not_json")
    made.checkpoint(2, {"0.0.0.0": 1, "0.0.0.1": 2})


def _fails(result: AuditResult) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.outcome == "fails"}


def _audit(made: MadeRun) -> AuditResult:
    return audit_run(made.engine, made.settings, made.folder)


def test_an_honest_run_balances(made: MadeRun) -> None:
    _honest(made)
    result = _audit(made)
    assert result.holds
    assert (result.balance.read, result.balance.trained, result.balance.in_flight) == (4, 2, 1)
    assert result.balance.dropped == {"not_json": 1}


def test_an_empty_run_balances(made: MadeRun) -> None:
    assert _audit(made).holds


def test_a_position_that_was_jumped_over_is_found(made: MadeRun) -> None:
    made.read(key(0), key(2))
    assert "part 0, epoch 0: 2 positions between 0 and 2" in str(_fails(_audit(made)))


def test_an_epoch_that_was_jumped_over_is_found(made: MadeRun) -> None:
    made.read(key(0), key(0, epoch=2))
    assert "part 0: epochs [0, 2]" in str(_fails(_audit(made)))


def test_a_window_that_was_jumped_over_is_found(made: MadeRun) -> None:
    made.read(key(0), key(0, window=2))
    assert "document 0.0.0: 2 windows up to number 2" in str(_fails(_audit(made)))


def test_a_document_trained_beyond_the_newest_checkpoint_is_found(made: MadeRun) -> None:
    _honest(made)
    made.ledger.mark_trained({"0.0.2.0": 3})
    assert "document 0.0.2.0 is marked trained at step 3" in str(_fails(_audit(made)))


def test_a_document_in_two_checkpoints_is_found(made: MadeRun) -> None:
    _honest(made)
    made.checkpoint(4, {"0.0.0.0": 1})
    assert "document 0.0.0.0 at steps 2 and 4" in str(_fails(_audit(made)))


def test_a_document_of_an_older_checkpoint_that_is_not_marked_is_found(made: MadeRun) -> None:
    _honest(made)
    made.checkpoint(1, {"0.0.2.0": 1})
    assert "document 0.0.2.0 is reading" in str(_fails(_audit(made)))


def test_the_newest_checkpoint_may_be_a_moment_ahead(made: MadeRun) -> None:
    _honest(made)
    made.checkpoint(4, {"0.0.2.0": 3})
    assert _audit(made).holds


def test_a_document_that_was_only_begun_does_not_count_as_trained(made: MadeRun) -> None:
    _honest(made)
    made.checkpoint(4, {}, partial=("0.0.0.0",))
    assert "document 0.0.0.0 is marked trained, checkpoint 4 has only begun it" in str(_fails(_audit(made)))


def test_a_document_whose_steps_were_all_skipped_counts_as_dropped(made: MadeRun) -> None:
    _honest(made)
    made.ledger.drop(key(2), reason="non_finite_loss")
    made.checkpoint(4, {"0.0.2.0": None})
    assert _audit(made).holds


def test_a_document_nobody_read_is_found(made: MadeRun) -> None:
    made.checkpoint(1, {"0.0.7.0": 1})
    assert "document 0.0.7.0 is in a checkpoint and was never read" in str(_fails(_audit(made)))


def test_a_state_that_no_rule_knows_breaks_the_balance(made: MadeRun) -> None:
    _honest(made)
    with transaction(made.engine) as session:
        session.execute(sa.update(DocumentRow).where(DocumentRow.position == 2).values(state="lost"))
    assert "documents are conserved" in _fails(_audit(made))


def _put_on_stream(made: MadeRun, *documents: str) -> None:
    """Through an embedded Redis that is killed afterwards, as at the end of a run that failed."""
    with Ports() as ports:
        port = ports.take(HOST, 0)
        log = made.folder.log("redis")
        server = Child("redis", [find_redis_server(), "-"], log=log, environ=child_environ())
        server.start(standard_input=server_configuration(made.folder.redis, port=port, password="p"))
        url = redis_url(port, "p")
        wait_until_it_answers(url, timeout_s=30.0, alive=lambda: server.is_running)
        client = connect(url, timeout_s=5.0)
        stream = DocumentStream(client, "made")
        for document in documents:
            stream.append(document, b"", lease=None)
        client.close()
        server.kill()


def test_scored_documents_are_looked_up_in_a_copy_of_the_redis_file(made: MadeRun) -> None:
    made.read(key(0), key(1))
    made.score(key(0), key(1))
    _put_on_stream(made, "0.0.0.0")
    before = {path: path.read_bytes() for path in made.folder.redis.rglob("*") if path.is_file()}
    assert _fails(_audit(made)) == {"scored documents are on the stream": "document 0.0.1.0 is not"}
    assert {path: path.read_bytes() for path in made.folder.redis.rglob("*") if path.is_file()} == before


def test_an_unreachable_redis_is_said_and_not_guessed(made: MadeRun) -> None:
    made.read(key(0))
    made.score(key(0))
    remote = made.settings.redis.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    made.settings = made.settings.model_copy(update={"redis": remote})
    (check,) = [check for check in _audit(made).checks if check.name == "scored documents are on the stream"]
    assert check.outcome == "not checked"
    assert "127.0.0.1:1" in check.detail


def test_the_command_prints_json_and_tells_by_its_exit_code(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    _honest(made)
    assert audit(str(made.folder.path), as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["read"], data["trained"], data["dropped"], data["holds"]) == (4, 2, {"not_json": 1}, True)
    made.read(key(9))
    assert audit(str(made.folder.path), as_json=False) == 1
    assert "fails        positions of each part and epoch have no gap" in capsys.readouterr().out

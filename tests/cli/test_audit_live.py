"""The audit beside a run that goes on: the trainer takes steps, writes and deletes checkpoints, marks and acknowledges
while it is read, and none of that looks like a contradiction."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine

from cli.audit import audit_run
from cli.audit_account import read_account
from cli.run_folder import RunFolder
from shared.database import open_database
from shared.ledger import Ledger, WindowStart
from tests.cli.conftest import key
from tests.shared.conftest import database, database_url, postgres_url
from tests.trainer.conftest import Stack, make_stack, policy_folder, redis_server
from tests.trainer.documents import plain_document
from trainer.assembly import train

__all__ = ["database", "database_url", "make_stack", "policy_folder", "postgres_url", "redis_server"]  # fixtures

STEPS = 24


def test_a_run_holds_at_any_moment(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(steps=STEPS, pairs_per_step=4, checkpoint_every=1, keep_checkpoints=1)
    folder = RunFolder(stack.settings.run.folder)

    def collect() -> None:
        for number in range(STEPS * 4 // 3):
            stack.write([plain_document(number, run=stack.run)])

    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(collect), threads.submit(train, stack.settings, Event())]
        looks = 0
        while True:
            looks += 1
            is_over = all(work.done() for work in working)
            result = audit_run(stack.ledger.engine, stack.settings, folder)
            assert [check for check in result.checks if check.outcome == "fails"] == []
            if is_over:
                break
        for work in working:
            work.result()
    assert looks > 5
    assert (result.read, result.balance.trained) == (STEPS * 4 // 3, STEPS * 4 // 3)


def test_the_database_is_read_as_of_one_moment(database: Engine, database_url: str) -> None:
    """A collector that begins a document between two of its queries is not seen by half."""
    Ledger(database, "run").begin([WindowStart(key(0), "d", 16)])
    other = open_database(database_url)

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM documents" in statement:
            Ledger(other, "run").begin([WindowStart(key(1), "d", 16)])

    sa.event.listen(database, "after_cursor_execute", interrupt)
    account = read_account(database, "run")
    assert (len(account.windows), account.cursors) == (1, {(0, 0): 1})
    sa.event.remove(database, "after_cursor_execute", interrupt)
    assert read_account(database, "run").cursors == {(0, 0): 2}
    other.dispose()

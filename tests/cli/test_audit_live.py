"""The audit beside a run that goes on: the trainer takes steps, writes and deletes checkpoints, marks and acknowledges
while it is read, and none of that looks like a contradiction."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine

from cli.audit import AuditResult, audit_run
from cli.audit_sources import read_account
from cli.run_folder import RunFolder
from shared.database import open_database
from shared.ledger import Ledger, WindowStart
from tests.cli.conftest import MadeRun, key
from tests.shared.conftest import database, database_url, postgres_url
from tests.trainer.conftest import Stack, make_stack, policy_folder, redis_server
from tests.trainer.windows import plain_window
from trainer.assembly import train

__all__ = ["database", "database_url", "make_stack", "policy_folder", "postgres_url", "redis_server"]  # fixtures

STEPS = 24
NUM_WINDOWS = 2 * STEPS
"""Of three pairs, where a step needs four."""


def test_a_run_holds_at_any_moment(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(steps=STEPS, pairs_per_step=4, checkpoint_every=1, keep_checkpoints=1, max_policy_lag=STEPS)
    folder = RunFolder(stack.settings.run.folder)

    def collect() -> None:
        for number in range(NUM_WINDOWS):
            stack.write([plain_window(number, run=stack.run)])

    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(collect), threads.submit(train, stack.settings, Event())]
        looks = 0
        while True:
            looks += 1
            is_over = all(work.done() for work in working)
            result = audit_run(stack.records.database, stack.settings, folder)
            assert [check for check in result.checks if check.outcome == "fails"] == []
            if is_over:
                break
        for work in working:
            work.result()
    assert looks > 5
    assert (result.read, result.balance.trained) == (NUM_WINDOWS, NUM_WINDOWS)


def test_the_database_is_read_as_of_one_moment(database: Engine, database_url: str) -> None:
    """A collector that begins a document between two of its queries is not seen by half."""
    Ledger(database, "run").begin([WindowStart(key(0), "d", 16)])
    other = open_database(database_url)

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM windows" in statement:
            Ledger(other, "run").begin([WindowStart(key(1), "d", 16)])

    sa.event.listen(database, "after_cursor_execute", interrupt)
    account = read_account(database, "run")
    assert (len(account.windows), account.cursors) == (1, {(0, 0): 1})
    sa.event.remove(database, "after_cursor_execute", interrupt)
    assert read_account(database, "run").cursors == {(0, 0): 2}
    other.dispose()


def audited_with(made: MadeRun, happen: Callable[[], None], *, before_query: int) -> tuple[AuditResult, int]:
    """What the audit says if something happens before its query of that number (from 0), and how many it makes."""
    asked: list[str] = []

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)
        if len(asked) == before_query + 1:
            happen()

    engine = open_database(made.settings.database_url)
    sa.event.listen(engine, "before_cursor_execute", interrupt)
    result = audit_run(engine, made.settings, made.folder)
    engine.dispose()
    return result, len(asked)


def test_a_checkpoint_in_the_middle_of_the_audit_is_no_contradiction(made: MadeRun) -> None:
    """Before each of its queries in turn: a step, a checkpoint, its line and its marks, and a document begun."""

    def go_on() -> None:
        step = next(steps)
        made.read(key(step))
        made.train(step, f"0.0.{step - 1}.0")

    made.read(key(0))
    steps, moment, num_queries = itertools.count(1), 0, 1
    while moment < num_queries:
        result, num_queries = audited_with(made, go_on, before_query=moment)
        assert [check for check in result.checks if check.outcome == "fails"] == [], moment
        moment += 1
    assert num_queries > 5

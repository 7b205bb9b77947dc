"""A run made by the real trainer, ledger and Redis holds; damaged in any of many ways it does not, and the audit names
the very thing that was damaged."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import redis
import sqlalchemy as sa
import torch

from cli.audit import AuditResult, audit_run
from cli.run_folder import RunFolder
from shared.database import open_database
from shared.ledger import WindowStart
from shared.records import ScoredWindow, WindowKey
from shared.redis import windows_key
from shared.settings import Settings
from tests.services.collector.processes import RedisProcess
from tests.trainer.conftest import Stack, build_stack, policy_folder, redis_server
from tests.trainer.windows import candidate, chunk, plain_window, window
from trainer.lead import Order
from trainer.loop import Trainer

__all__ = ["policy_folder", "redis_server"]  # fixtures


def key(position: int, *, window: int = 0, part: int = 0, epoch: int = 0) -> WindowKey:
    return WindowKey(part=part, epoch=epoch, position=position, window=window)


def scored(number: int, at: WindowKey, run: str) -> ScoredWindow:
    return plain_window(number, run=run).model_copy(update={"key": at})


def train_a_run(stack: Stack) -> None:
    """Two parts, two epochs; documents of one to three windows; one refused, one undecided, one whose loss was not
    finite; seven steps of one window of three pairs, of which the checkpoints of steps 2, 4 and 6 are pruned; five
    windows left on the stream and two being read."""
    ledger = stack.ledger
    sizes = {(0, 0, 0): 1, (0, 0, 1): 3, (0, 0, 3): 2, (0, 1, 0): 1, (1, 0, 0): 3, (1, 0, 1): 1, (0, 1, 2): 2}
    keys = [
        [key(position, part=part, epoch=epoch, window=window) for window in range(size)]
        for (part, epoch, position), size in sizes.items()
    ]
    ledger.drop(key(2), reason="not_json", source_id="f:3")
    for windows in keys:
        ledger.begin([WindowStart(one, "d", 16) for one in windows])
    tie = window(9, [chunk(4, [candidate("original", 1), candidate("rewrite", 2)], (0.5, 0.5))], run=stack.run)
    ledger.begin([WindowStart(key(1, epoch=1), "tie", 16)])
    ready = [scored(number, one, stack.run) for number, one in enumerate(chain(*keys))]
    for one in [tie.model_copy(update={"key": key(1, epoch=1)}), *ready]:
        stack.stream.write(one)
        ledger.mark_scored(one.key, num_chunks=len(one.chunks), num_dropped_chunks=0, weight_version=0)
    ledger.begin([WindowStart(key(2, part=1, window=window), "d", 16) for window in range(2)])
    _run_with_a_bad_step(stack.prepare())


def _run_with_a_bad_step(trainer: Trainer) -> None:
    """The loss of the first is not finite. The weights after each step are a version."""
    take_step, norm = trainer.take_step, trainer.policy.model.get_parameter("model.norm.weight")
    good = norm.detach().clone()

    def published_before(order: Order) -> None:
        trainer.publisher.wait()
        take_step(order)

    def spoiled(order: Order) -> None:
        with torch.no_grad():
            norm.fill_(float("nan"))
        take_step(order)
        with torch.no_grad():
            norm.copy_(good)

    steps = chain([spoiled], repeat(published_before))
    with patch.object(trainer, "take_step", lambda order: next(steps)(order)):
        trainer.run()


@dataclass
class CopiedRun:
    """The run's database and checkpoints, to be damaged; the stream is that of the run itself."""

    settings: Settings
    client: Any

    def __post_init__(self) -> None:
        self.engine = open_database(self.settings.database_url)

    @property
    def evidence(self) -> Path:
        return self.settings.run.folder / "checkpoints/finished.jsonl"

    def sql(self, statement: str) -> None:
        with self.engine.begin() as connection:
            assert connection.execute(sa.text(statement)).rowcount > 0, "it damaged nothing"

    def lines(self, change: Callable[[list[str]], list[str]]) -> None:
        before = self.evidence.read_text().splitlines()
        after = change(before)
        assert before != after
        self.evidence.write_text("".join(f"{line}\n" for line in after))

    def audit(self) -> AuditResult:
        return audit_run(self.engine, self.settings, RunFolder(self.settings.run.folder))


@pytest.fixture(scope="module")
def good_run(
    redis_server: RedisProcess, policy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("good")
    stack = build_stack(
        folder,
        policy_folder,
        redis_server.url,
        run=folder.name,
        num_parts=2,
        steps=7,
        pairs_per_step=3,
        checkpoint_every=2,
        keep_checkpoints=1,
    )
    train_a_run(stack)
    stack.end_trainers()
    stack.records.close()
    return stack.settings, folder


@pytest.fixture
def run(good_run: tuple[Settings, Path], tmp_path: Path) -> Iterator[CopiedRun]:
    settings, folder = good_run
    shutil.copytree(folder, tmp_path / "copy")
    moved = settings.model_copy(update={"run": settings.run.model_copy(update={"directory": tmp_path / "copy"})})
    made = CopiedRun(moved, redis.Redis.from_url(settings.redis.url))
    yield made
    made.engine.dispose()


def problems(result: AuditResult) -> str:
    return "\n".join(problem for check in result.checks for problem in check.problems)


def test_the_run_holds(run: CopiedRun) -> None:
    result = run.audit()
    assert problems(result) == ""
    assert {check.outcome for check in result.checks} == {"holds"}
    balance = result.balance
    assert (result.read, balance.trained, balance.reading, balance.scored) == (17, 7, 2, 5)
    assert balance.dropped == {"not_json": 1, "no_preference": 1, "non_finite_loss": 1}
    assert [json.loads(line)["step"] for line in run.evidence.read_text().splitlines()] == [2, 4, 6, 7]


def at(part: int, epoch: int, position: int, window: int | None = None) -> str:
    where = f"part = {part} AND epoch = {epoch} AND position = {position}"
    return where if window is None else f"{where} AND window = {window}"


TRAINED = "UPDATE windows SET state = 'trained', reason = '', trained_step = 3, num_pairs = 3 WHERE "
SQL = {
    "the first window of a document": (f"DELETE FROM windows WHERE {at(0, 0, 1, 0)}", "window 0.0.1.0 has no row"),
    "a middle window": (f"DELETE FROM windows WHERE {at(0, 0, 1, 1)}", "window 0.0.1.1 has no row"),
    "the last window": (f"DELETE FROM windows WHERE {at(0, 0, 1, 2)}", "window 0.0.1.2 has no row"),
    "the last window of one being read": (f"DELETE FROM windows WHERE {at(1, 0, 2, 1)}", "window 1.0.2.1 has no row"),
    "all rows of a document": (f"DELETE FROM windows WHERE {at(0, 0, 1)}", "document 0.0.1 has no row"),
    "a refused line": (f"DELETE FROM windows WHERE {at(0, 0, 2)}", "document 0.0.2 has no row"),
    "the last document of a part": (f"DELETE FROM windows WHERE {at(1, 0, 2)}", "document 1.0.2 has no row"),
    "the last document of an epoch": (f"DELETE FROM windows WHERE {at(0, 1, 2)}", "document 0.1.2 has no row"),
    "a cursor": ("DELETE FROM cursors WHERE part = 1", "document 1.0.0 has rows: part 1, epoch 0 has no cursor"),
    "a cursor set back": ("UPDATE cursors SET num_positions = 1 WHERE part = 1", "document 1.0.2 has rows"),
    "a step": ("DELETE FROM steps WHERE step = 3", "step 3 has no row"),
    "the newest step": ("DELETE FROM steps WHERE step = 7", "step 7 has no row"),
    "a step skipped": ("UPDATE steps SET step = 8 WHERE step = 5", "step 5 has no row"),
    "pairs of a step": (
        "UPDATE steps SET figures = json_set(figures, '$.pairs', 5) WHERE step = 2",
        "step 2 took 5 pairs by its row, 3 by the checkpoints",
    ),
    "the first weight version": (
        "DELETE FROM weight_versions WHERE version = 0",
        "weight version 1 of step 1 is the first",
    ),
    "a weight version": ("DELETE FROM weight_versions WHERE version = 4", "weight version 4 has no row"),
    "the newest weight version": (
        "DELETE FROM weight_versions WHERE version = 7",
        "the trainer finished at step 7, and no weight version of that step has a row",
    ),
    "one being read is called trained": (TRAINED + at(1, 0, 2, 0), "window 1.0.2.0 is marked trained at step 3"),
    "a scored one is called trained": (TRAINED + at(0, 1, 2, 1), "window 0.1.2.1 is marked trained at step 3"),
    "a refused one is called trained": (TRAINED + at(0, 0, 2), "window 0.0.2.0 is marked trained at step 3"),
    "a non-finite one is called trained": (
        TRAINED + at(0, 0, 0),
        "window 0.0.0.0 is marked trained at step 3, no checkpoint contains it",
    ),
    "all are called trained": (TRAINED + "state <> 'trained'", "window 0.1.1.0 is marked trained at step 3"),
    "a trained one is called dropped": (
        f"UPDATE windows SET state = 'dropped', reason = 'stale' WHERE {at(0, 0, 1, 1)}",
        "window 0.0.1.1 is dropped (stale), the checkpoint of step 2 says trained",
    ),
    "a trained one is called scored": (
        f"UPDATE windows SET state = 'scored' WHERE {at(1, 0, 0, 0)}",
        "window 1.0.0.0 is scored, the checkpoint of step",
    ),
    "one is called non-finite": (
        f"UPDATE windows SET state = 'dropped', reason = 'non_finite_loss' WHERE {at(1, 0, 2, 0)}",
        "window 1.0.2.0 is dropped as non_finite_loss, no skipped step had it",
    ),
    "a state that no rule knows": (
        f"UPDATE windows SET state = 'lost' WHERE {at(1, 0, 2, 0)}",
        "window 1.0.2.0 is 'lost'",
    ),
    "another step": (
        f"UPDATE windows SET trained_step = 1 WHERE {at(0, 0, 1, 1)}",
        "window 0.0.1.1 is marked trained at step 1, the checkpoint of step 2 says step 2",
    ),
    "a step beyond the newest checkpoint": (
        f"UPDATE windows SET trained_step = 9 WHERE {at(0, 0, 1, 1)}",
        "window 0.0.1.1 is marked trained at step 9, the newest checkpoint is of 7",
    ),
    "another number of pairs": (
        f"UPDATE windows SET num_pairs = 2 WHERE {at(0, 0, 1, 1)}",
        "window 0.0.1.1 is marked as giving 2 pairs, the checkpoint of step 2 says 3",
    ),
    "fewer scored chunks than pairs": (
        f"UPDATE windows SET num_chunks = 2 WHERE {at(0, 0, 1, 1)}",
        "window 0.0.1.1 gave 3 pairs, it has 2 scored chunks",
    ),
    "another number of windows": (
        f"UPDATE windows SET num_windows = 4 WHERE {at(0, 0, 1)}",
        "window 0.0.1.3 has no row: its document has 4",
    ),
}


def without(index: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: [line for number, line in enumerate(lines) if number != index]


def fewer_pairs(line: str) -> str:
    return line.replace('"num_pairs":3', '"num_pairs":2')


LINES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "the first": (without(0), "the evidence of checkpoint number 1, between steps 0 and 2, is missing"),
    "a middle one": (without(1), "the evidence of checkpoint number 2, between steps 2 and 4, is missing"),
    "the last": (without(3), "checkpoint step-00000007 has no line: the evidence of step 7 is missing"),
    "all": (lambda lines: [], "checkpoint step-00000007 has no line"),
    "a second one": (lambda lines: [*lines, fewer_pairs(lines[1])], "checkpoint number 2 has a second line"),
    "the windows of a second one": (
        lambda lines: [*lines, fewer_pairs(lines[1])],
        "window 0.0.3.0 was finished by two checkpoints, of steps 4 and 4",
    ),
    "another order": (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "checkpoint number 2 has a second line"),
    "damaged": (lambda lines: [lines[0], lines[1][:40], *lines[2:]], "line 2 can't be read"),
    "a window twice": (
        lambda lines: [
            lines[0],
            lines[1].replace('"finished":{', '"finished":{' + _first_of(lines[0]) + ","),
            *lines[2:],
        ],
        "window 0.0.1.0 was finished by two checkpoints, of steps 2 and 4",
    ),
    "another number of pairs": (
        lambda lines: [fewer_pairs(lines[0]), *lines[1:]],
        "step 2 took 3 pairs by its row, 2 by the checkpoints",
    ),
    "of the newest": (
        lambda lines: [*lines[:3], fewer_pairs(lines[3])],
        "checkpoint step-00000007 and the evidence of step 7 disagree",
    ),
}


def _first_of(line: str) -> str:
    document, finished = next(iter(json.loads(line)["finished"].items()))
    return json.dumps({document: finished})[1:-1]


DAMAGE: list[tuple[str, Callable[[CopiedRun], None], str]] = [
    *((what, partial(CopiedRun.sql, statement=statement), expected) for what, (statement, expected) in SQL.items()),
    *(
        (f"lines: {what}", partial(CopiedRun.lines, change=change), expected)
        for what, (change, expected) in LINES.items()
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [pytest.param(*rest, id=what) for what, *rest in DAMAGE])
def test_damage_is_found_and_named(run: CopiedRun, damage: Callable[[CopiedRun], None], expected: str) -> None:
    damage(run)
    result = run.audit()
    assert not result.holds
    assert expected in problems(result)


def test_a_torn_last_line_is_none(run: CopiedRun) -> None:
    with run.evidence.open("a") as file:
        file.write('{"number":5,"after":7,"st')
    assert problems(run.audit()) == ""


def test_an_exact_copy_of_a_line_is_none(run: CopiedRun) -> None:
    """A trainer that was replaced while it wrote may repeat its last line."""
    run.lines(lambda lines: [*lines, lines[1]])
    assert problems(run.audit()) == ""


def test_an_entry_that_the_stream_lost_is_found(run: CopiedRun) -> None:
    stream = windows_key(run.settings.run.name)
    entry, fields = next(one for one in run.client.xrange(stream) if one[1][b"id"] == b"0.1.2.1")
    run.client.xdel(stream, entry)
    try:
        assert problems(run.audit()) == "window 0.1.2.1 is not on the stream"
    finally:
        run.client.xadd(stream, fields)

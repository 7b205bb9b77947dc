"""Whole runs, every process real: they end, resume, survive deaths of their parts, and leave nothing behind.

Each test starts the stack as few times as it can: a start costs seconds of imports in five processes.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shared.weights.state import map_state, state_checksum
from shared.weights.store import WeightStore
from tests.cli.launched import WAIT_S, Recipe, is_alive, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = ["the", "sea", "a", "hill", "of", "old", "stone", "and", "green", "light", "over", "quiet", "fields"]
BY_LENGTH = '{"python": {"function": "tests.cli.scoring:prefer_short"}}'
NEXT_TOKEN = (
    "--trainer.objective", "next_token", "--collector.schedule", '[{"kinds": ["original"], "num_rollouts": 0}]'
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A tiny policy and a few hundred short documents, every tenth line no JSON."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) for _ in range(300)]
    lines[::10] = ["not json"] * 30
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_model(tmp_path)
    return Recipe(tmp_path, ("--judge.criteria", BY_LENGTH))


def test_a_run_survives_the_death_of_every_part_and_goes_on_after_its_end(recipe: Recipe) -> None:
    with recipe.launch("--trainer.steps", "60") as run:
        for step, roles in ((3, ["collector", "redis"]), (7, ["trainer", "rollout", "judge"])):
            run.wait_for_step(step)
            for role in roles:
                run.kill(role)
                run.wait_until(lambda role=role: run.num_starts(role) == 2, what=f"a new {role}")  # type: ignore[misc]
        assert run.finish() == 0, run.output
        assert not any(is_alive(pid) for pid in run.pids().values())
    assert "step 60 of 60" in run.output
    assert "everything balances" in run.output
    assert (recipe.run_folder / "report" / "report.md").exists()
    with recipe.launch("--trainer.steps", "63") as again:
        assert again.finish() == 0, again.output
    assert recipe.steps() == list(range(1, 64))
    result = recipe.audit()
    assert result.holds, result
    assert result.balance.dropped["not_json"] > 0


def test_a_run_whose_weights_travel_through_a_bucket(recipe: Recipe, s3: Any) -> None:
    """Full and sparse versions, none of them refused; the last whole one that the rollout service had is what the
    trainer put there, checksum and all. A second start goes on in the same bucket."""
    options = ("--weights.store", "s3://weights/run", "--rollout.engine.dtype", "bfloat16")
    with recipe.launch("--trainer.steps", "6", *options) as run:
        assert run.finish() == 0, run.output
    with recipe.launch("--trainer.steps", "8", *options) as again:
        assert again.finish() == 0, again.output
    assert recipe.steps() == list(range(1, 9))
    assert recipe.audit().holds
    store = WeightStore("s3://weights/run")
    assert {store.manifest(version).form for version in store.versions()} == {"full", "sparse"}
    assert store.manifest(store.versions()[-1]).step == 8
    copies = (recipe.run_folder / "replicas").glob("*/v*/model.safetensors")  # a replica for each port
    served = {int(copy.parent.name.removeprefix("v")): state_checksum(map_state(copy)) for copy in copies}
    newest = max(served)  # the second start's, which the store still has
    assert store.manifest(newest).step >= 6
    assert served[newest] == store.manifest(newest).state_checksum
    assert "refused_weights" not in recipe.event_kinds()


def test_a_judge_that_hangs_makes_the_run_wait_and_a_resumed_run_stops_calmly(recipe: Recipe) -> None:
    with recipe.launch("--trainer.steps", "5000") as run:
        run.wait_for_step(2)
        os.kill(run.pids()["judge"], signal.SIGSTOP)
        time.sleep(3.0)  # what was judged before is trained meanwhile
        stalled_at = max(recipe.steps())
        time.sleep(4.0)
        assert max(recipe.steps()) == stalled_at
        os.kill(run.pids()["judge"], signal.SIGCONT)
        run.wait_for_step(stalled_at + 3)
        pids = run.pids()
        run.kill_launcher()
        _wait_until_dead(pids)
    assert recipe.audit().holds
    with recipe.launch("--trainer.steps", "5000") as resumed:
        resumed.wait_for_step(stalled_at + 10)
        resumed.signal(signal.SIGINT)
        assert resumed.finish() == 128 + signal.SIGINT, resumed.output
        assert not any(is_alive(pid) for pid in resumed.pids().values())
    assert recipe.steps() == list(range(1, len(recipe.steps()) + 1))
    assert recipe.audit().holds
    assert min(recipe.rewards()) >= 0.1  # the judge never gives less


def test_a_part_that_cannot_work_ends_the_run_with_its_reason(recipe: Recipe) -> None:
    with recipe.launch("--judge.criteria", '{"python": {"function": "tests.cli.scoring:absent"}}') as run:
        assert run.finish() == 1
        assert "judge ended with exit status 1 before it was ready" in run.output
        assert "absent" in run.output
        assert not any(is_alive(pid) for pid in run.pids().values())


def _wait_until_dead(pids: dict[str, int]) -> None:
    deadline = time.monotonic() + WAIT_S
    while alive := [role for role, pid in pids.items() if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


def test_two_runs_at_once_do_not_meet(recipe: Recipe, tmp_path: Path) -> None:
    options = (*NEXT_TOKEN, "--trainer.steps", "4")
    with recipe.launch(*options) as one, recipe.launch(*options, "--run.name", "other") as two:
        assert (one.finish(), two.finish()) == (0, 0), one.output + two.output
    assert "collector listens on" in one.output + two.output
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"small", "other"}


def test_a_run_whose_documents_ended_goes_on_with_more_epochs(recipe: Recipe) -> None:
    path = recipe.folder / "documents.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:6]), encoding="utf-8")
    options = (*NEXT_TOKEN, "--trainer.steps", "100")
    with recipe.launch(*options, "--documents.max_epochs", "1") as run:
        assert run.finish() == 0, run.output
    once = recipe.audit().balance
    with recipe.launch(*options, "--documents.max_epochs", "2") as again:
        assert again.finish() == 0, again.output
    twice = recipe.audit().balance
    assert once.trained > 0
    assert (twice.trained, twice.dropped["not_json"]) == (2 * once.trained, 2), again.output

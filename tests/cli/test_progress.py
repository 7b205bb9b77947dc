"""What a running run shows."""

import io

import pytest
from rich.console import Console

from cli.progress import Display, Rate, Snapshot, duration, panel, rows, sum_of_metric
from shared.ledger import Balance
from shared.stream import Backlog


def _snapshot(step: int) -> Snapshot:
    figures = {
        "loss": 0.6931,
        "reward_original": 0.5,
        "reward_rollout": 0.25,
        "chosen_rollout_rate": 0.125,
        "policy_lag_mean": 1.5,
        "policy_lag_max": 3.0,
        "tokens_per_second": 12345.6,
        "saved_token_share": 0.8,
        "mfu": 0.415,
    }
    return Snapshot(
        step=step,
        steps=60,
        figures=figures,
        balance=Balance(read=9, trained=4, dropped={"stale": 1}, reading=2, scored=2),
        backlog=Backlog(unread=1, pending=3),
        trainer="host:71:5f",
        steps_per_minute=6.0,
        candidates_per_second=12.34,
    )


def test_everything_known_is_shown() -> None:
    assert dict(rows(_snapshot(10))) == {
        "loss": "0.6931",
        "reward": "original 0.500, rollout 0.250",
        "rollout chosen": "12%",
        "policy lag": "mean 1.5, max 3",
        "speed": "12,346 tokens/s, 80% of tokens saved by the tree, MFU 42%",
        "queue": "1 unread, 3 pending",
        "trainer": "host:71:5f",
        "windows": "9 read, 4 trained",
        "dropped": "1 stale",
        "rate": "6.0 steps/min, 12.3 candidates/s",
        "left": "8 min 20 s",
    }


def test_separate_sequences_on_a_cpu_have_a_speed_only() -> None:
    figures = {"tokens_per_second": 900.0, "saved_token_share": -0.07}
    assert rows(Snapshot(step=1, steps=60, figures=figures)) == [("speed", "900 tokens/s")]


def test_a_judge_that_fell_is_named_in_capitals() -> None:
    figures = {"judge_probe_accuracy_first": 0.9, "judge_probe_accuracy_last": 0.6, "judge_probes_fell": 1.0}
    fallen = "FALLEN: the policy may have learned to please its judge"
    shown = dict(rows(Snapshot(step=1, steps=60, figures=figures)))
    assert shown == {"judge probes": f"originals preferred 60% (at first 90%), {fallen}"}
    steady = dict(rows(Snapshot(step=1, steps=60, figures=figures | {"judge_probes_fell": 0.0})))
    assert steady == {"judge probes": "originals preferred 60% (at first 90%)"}


def test_what_is_unknown_is_absent() -> None:
    assert rows(Snapshot(step=0, steps=60)) == []


def test_a_terminal_sees_every_row() -> None:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(panel(_snapshot(10)))
    shown = capture.get()
    assert "step 10 of 60" in shown
    for name, value in rows(_snapshot(10)):
        assert name in shown
        assert value in shown


def test_plain_lines_come_when_the_step_moves_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    for step in (1, 1, 2, 60, 60):
        display.show(_snapshot(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/60", "step 60/60"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (250, "4 min 10 s"), (11100, "3 h 05 min")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_rate_is_measured_over_its_window() -> None:
    times = iter((0.0, 5.0, 10.0, 20.0))
    rate = Rate(lambda: next(times), window_s=10.0)
    assert rate.per_second is None
    for value in (0.0, 10.0, 20.0, 80.0):
        rate.observe(value)
    assert rate.per_second == 6.0  # from the look at 10.0, the last one not older than the window


def test_a_rate_begins_again_when_its_process_did() -> None:
    times = iter((0.0, 1.0, 2.0))
    rate = Rate(lambda: next(times))
    for value in (100.0, 0.0, 3.0):
        rate.observe(value)
    assert rate.per_second == 3.0


def test_a_metric_is_summed_over_its_labels() -> None:
    text = '# TYPE a_total counter\na_total{kind="x"} 2\na_total{kind="y"} 3\n# TYPE b gauge\nb 7\n'
    assert sum_of_metric(text, "a_total") == 5

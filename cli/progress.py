"""How far a run is: read about once a second, and shown as a live panel or as plain lines.

Steps and windows come from the database, the backlog from Redis, rates from the collector. What does not answer is
None in the snapshot, never zero.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import httpx
import redis
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from cli.plan import Plan
from shared.coordination import Coordination
from shared.database import StepRow, transaction
from shared.errors import DatabaseError, StreamError
from shared.http import authorization_header
from shared.ledger import Balance
from shared.records import TRAINER_PART
from shared.runs import Run
from shared.stream import Backlog, WindowStream

if TYPE_CHECKING:
    from rich.panel import Panel

_RATE_WINDOW_S = 120.0
_PLAIN_EVERY_S = 10.0


@dataclass(frozen=True)
class Snapshot:
    step: int
    steps: int
    figures: dict[str, float] = field(default_factory=dict)
    """Of the newest step, by the names of trainer/figures.py."""
    balance: Balance | None = None
    backlog: Backlog | None = None
    trainer: str | None = None
    """Who holds the trainer's lease, `host:process id:random`."""
    steps_per_minute: float | None = None
    candidates_per_second: float | None = None

    @property
    def seconds_left(self) -> float | None:
        if not self.steps_per_minute:
            return None
        return (self.steps - self.step) / self.steps_per_minute * 60


class Rate:
    """How fast a counter has been rising lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, window_s: float = _RATE_WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._seen: deque[tuple[float, float]] = deque()

    def observe(self, value: float) -> None:
        """A number below the last one restarts the measurement: the process was restarted."""
        now = self._clock()
        if self._seen and value < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, value))
        while len(self._seen) > 2 and self._seen[0][0] < now - self._window_s:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """None until the number has changed."""
        if len(self._seen) < 2 or self._seen[-1][1] == self._seen[0][1]:
            return None
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else None


class ProgressReader:
    def __init__(self, run: Run, plan: Plan, client: redis.Redis) -> None:
        self._run = run
        self._steps = plan.settings.trainer.steps
        self._stream = WindowStream(client, run.name)
        self._coordination = Coordination(client, run.name)
        self._metrics_url = str(plan.ready_url("collector")).replace("/readyz", "/metrics")
        self._headers = authorization_header(plan.secrets.token)
        self._step_rate, self._candidate_rate = Rate(), Rate()

    def look(self) -> Snapshot:
        step, figures = self._newest_step()
        self._step_rate.observe(step)
        candidates = self._candidates()
        if candidates is not None:
            self._candidate_rate.observe(candidates)
        per_second = self._step_rate.per_second
        balance, backlog, trainer = None, None, None
        with suppress(DatabaseError):  # locked for longer than its timeout: try again at the next look
            balance = self._run.ledger.balance()
        with suppress(StreamError):
            backlog = self._stream.backlog()
            trainer = self._coordination.lease_owner(TRAINER_PART)
        return Snapshot(
            step, self._steps, figures, balance, backlog, trainer,
            steps_per_minute=per_second * 60 if per_second else None,
            candidates_per_second=self._candidate_rate.per_second,
        )  # fmt: skip

    def _newest_step(self) -> tuple[int, dict[str, float]]:
        query = sa.select(StepRow).where(StepRow.run_id == self._run.name).order_by(StepRow.step.desc()).limit(1)
        with transaction(self._run.database) as session:
            row = session.scalar(query)
            return (row.step, dict(row.figures)) if row else (0, {})

    def _candidates(self) -> float | None:
        """Candidates gathered since the collector started."""
        try:
            answer = httpx.get(self._metrics_url, headers=self._headers, timeout=2.0)
        except httpx.HTTPError:
            return None
        return sum_of_metric(answer.text, "headwater_candidates_total") if answer.is_success else None


def sum_of_metric(text: str, name: str) -> float:
    """Sum over all labels of one metric in Prometheus text."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return float(sum(sample.value for sample in samples if sample.name == name))


class Display(AbstractContextManager["Display"]):
    """For logs and pipes: a line every ten seconds if the step has moved, and one at the end."""

    def __init__(self) -> None:
        self._shown_step = -1
        self._shown_at = 0.0

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def say(self, text: str) -> None:
        """An event, such as a process that died, on its own line."""
        print(text, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        is_last = snapshot.step == snapshot.steps
        if snapshot.step == self._shown_step or (now - self._shown_at < _PLAIN_EVERY_S and not is_last):
            return
        self._shown_step, self._shown_at = snapshot.step, now
        self.say("  ".join([f"step {snapshot.step}/{snapshot.steps}", *(f"{k} {v}" for k, v in rows(snapshot))]))


class LiveDisplay(Display):
    """For terminals."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(panel(snapshot))


def panel(snapshot: Snapshot) -> "Panel":
    """A progress bar, and a row for everything known."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    figures = Table.grid(padding=(0, 2))
    for name, value in rows(snapshot):
        figures.add_row(Text(name, style="dim"), Text(value))
    content = Table.grid()  # a bar in a Group would swallow the line after it
    content.add_row(ProgressBar(total=snapshot.steps, completed=snapshot.step, width=60))
    content.add_row(figures)
    return Panel(content, title=f"step {snapshot.step} of {snapshot.steps}", title_align="left", expand=False)


def choose_display() -> Display:
    return LiveDisplay() if sys.stdout.isatty() else Display()


def rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Name and value of everything known, the most interesting first."""
    return [*_figure_rows(snapshot.figures), *_delivery_rows(snapshot)]


def _figure_rows(figures: dict[str, float]) -> Iterator[tuple[str, str]]:
    if "loss" in figures:
        yield "loss", f"{figures['loss']:.4f}"
    rewards = [(kind, figures.get(f"reward_{kind}")) for kind in ("original", "rewrite", "rollout")]
    if known := [f"{kind} {reward:.3f}" for kind, reward in rewards if reward is not None]:
        yield "reward", ", ".join(known)
    if "chosen_rollout_rate" in figures:
        yield "rollout chosen", f"{figures['chosen_rollout_rate']:.0%}"
    if probes := list(_probes(figures)):
        yield "judge probes", ", ".join(probes)
    if figures.get("barred_rate") or figures.get("unscored_candidates"):
        barred, unscored = figures.get("barred_rate", 0.0), figures.get("unscored_candidates", 0)
        yield "candidates", f"{barred:.0%} barred, {unscored:.0f} unscored"
    if "policy_lag_max" in figures:
        yield "policy lag", f"mean {figures['policy_lag_mean']:.1f}, max {figures['policy_lag_max']:.0f}"
    if "tokens_per_second" in figures:
        yield "speed", ", ".join(_speeds(figures))


def _probes(figures: dict[str, float]) -> Iterator[str]:
    """What the judge does with pairs whose better text is known, once there are two blocks of them."""
    for name, what in (("judge_probe_accuracy", "originals"), ("judge_probe_human_over_base", "human texts")):
        if (last := figures.get(f"{name}_last")) is not None:
            yield f"{what} preferred {last:.0%} (at first {figures[f'{name}_first']:.0%})"
    if figures.get("judge_probes_fell"):
        yield "FALLEN: the policy may have learned to please its judge"


def _speeds(figures: dict[str, float]) -> Iterator[str]:
    yield f"{figures['tokens_per_second']:,.0f} tokens/s"
    if (saved := figures.get("saved_token_share", 0.0)) > 0:
        yield f"{saved:.0%} of tokens saved by the tree"
    if "mfu" in figures:
        yield f"MFU {figures['mfu']:.0%}"


def _delivery_rows(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    if snapshot.backlog is not None:
        yield "queue", f"{snapshot.backlog.unread} unread, {snapshot.backlog.pending} pending"
    if snapshot.trainer is not None:  # not always ours: a new one waits for the end of an earlier start's
        yield "trainer", snapshot.trainer
    if snapshot.balance is not None:
        yield "windows", f"{snapshot.balance.read} read, {snapshot.balance.trained} trained"
        dropped = sorted(snapshot.balance.dropped.items())
        yield "dropped", ", ".join(f"{number} {reason}" for reason, number in dropped) or "none"
    rates = ((snapshot.steps_per_minute, "steps/min"), (snapshot.candidates_per_second, "candidates/s"))
    if known := [f"{value:.1f} {unit}" for value, unit in rates if value is not None]:
        yield "rate", ", ".join(known)
    if snapshot.seconds_left is not None:
        yield "left", duration(snapshot.seconds_left)


def duration(seconds: float) -> str:
    """Two units at most: `3 h 05 min`, `4 min 10 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"

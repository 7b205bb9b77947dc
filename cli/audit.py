"""`headwater audit`: Prove that no window was lost or trained twice: read = trained + dropped + in flight.

The left side comes from the cursors and each document's number of windows, the right side from the windows' states.
Each state is then compared with what was written elsewhere at another time: the evidence of every checkpoint, the rows
of steps and weight versions, the leases, the stream. docs/cli.md lists the checks.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import sqlalchemy as sa
import typer

from cli import audit_checks
from cli.audit_sources import (
    Account,
    OnStream,
    StreamUnreachable,
    Testimony,
    Window,
    read_account,
    read_on,
    read_stream,
    read_testimony,
    read_waiting,
)
from cli.run_folder import RunFolder, RunName, find_run
from shared.ledger import READING, SCORED, Balance
from shared.runs import reading_run
from shared.settings import Settings

Outcome = Literal["holds", "fails", "not checked"]
RECHECK_S = 1.0
"""On top of the time in which a collector takes a free part."""
_SHOWN = 5


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Outcome
    detail: str
    problems: tuple[str, ...] = ()
    """All contradictions; `detail` names the first."""


@dataclass(frozen=True)
class AuditResult:
    run: str
    read: int
    """Windows, by cursors and numbers of windows."""
    balance: Balance
    checks: tuple[Check, ...]

    @property
    def balances(self) -> bool:
        return self.read == self.balance.trained + sum(self.balance.dropped.values()) + self.balance.in_flight

    @property
    def equation(self) -> str:
        """The conservation law of the run as a sentence."""
        found = self.balance
        return (
            f"{self.read} windows read {'=' if self.balances else 'is NOT'} {found.trained} trained + "
            f"{sum(found.dropped.values())} dropped + {found.in_flight} in flight"
        )

    @property
    def holds(self) -> bool:
        """No contradiction; what `unchecked` names is not proved."""
        return all(check.outcome != "fails" for check in self.checks)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Checks that could not be made."""
        return tuple(check.name for check in self.checks if check.outcome == "not checked")


def audit(
    run: RunName, *, as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False
) -> int:
    """Print the findings; 1 when something does not balance."""
    folder, settings = find_run(run)
    with reading_run(settings) as opened:
        result = audit_run(opened.database, settings, folder)
    print(json.dumps(as_data(result), indent=2) if as_json else "\n".join(as_lines(result)))
    return 0 if result.holds else 1


def audit_run(
    database: sa.Engine, settings: Settings, folder: RunFolder, *, wait: Callable[[float], None] = time.sleep
) -> AuditResult:
    """Look once. If collectors work and something does not fit, look again when a free part has had time to be taken:
    only what does not fit both times is a contradiction."""
    first, is_running = _look(database, settings, folder)
    if first.holds or not is_running:
        return first
    wait(settings.collector.lease_s / 3 + RECHECK_S)
    second, _ = _look(database, settings, folder)
    seen = {problem for check in first.checks for problem in check.problems}
    return replace(second, checks=tuple(_confirmed(check, seen) for check in second.checks))


def _look(database: sa.Engine, settings: Settings, folder: RunFolder) -> tuple[AuditResult, bool]:
    """The findings, and whether a collector works.

    The trainer writes a step's row, its checkpoint and its line of evidence, then marks the ledger, then acknowledges.
    So the database, read after the checkpoints, has all their steps; and the lines, read again after the database, have
    everything that it calls trained.
    """
    run_id = settings.run.name
    earlier = read_testimony(folder.checkpoints)
    account = read_account(database, run_id)
    later = read_on(folder.checkpoints, earlier)
    try:
        stream, trouble = read_stream(settings, folder), ""
    except StreamUnreachable as exc:
        stream, trouble = None, str(exc)
    # a window that changed while the stream was read is no contradiction
    still = read_waiting(database, run_id)
    waiting = {name: row for name, row in account.in_state(READING, SCORED).items() if still.get(name) == row}
    checks = (*_of_stores(account, earlier, later), *_of_flight(waiting, stream, trouble))
    result = AuditResult(run_id, audit_checks.windows_read(account), account.balance, checks)
    conserved = _check("documents are conserved", [] if result.balances else [result.equation])
    conserved = replace(conserved, detail=result.equation)
    return replace(result, checks=(conserved, *checks)), bool(stream and stream.leased)


def _of_stores(account: Account, earlier: Testimony, later: Testimony) -> Iterable[Check]:
    found = {
        "every position of each part has its document": audit_checks.positions(account),
        "every document has all its windows": audit_checks.windows(account),
        "every window is in a known state": audit_checks.states(account),
        "every checkpoint left its evidence": audit_checks.lines(earlier, account),
        "no window is in two checkpoints": audit_checks.in_two_checkpoints(earlier),
        "trained windows are in a checkpoint": audit_checks.unproved(account, later),
        "windows of skipped steps were skipped": audit_checks.unskipped(account),
        "windows of the checkpoints are marked so": audit_checks.unmarked(account, earlier),
        "steps have no gap up to the newest checkpoint": audit_checks.steps(account, earlier),
        "pairs of each step came from its windows": audit_checks.pairs(account, earlier),
        "weight versions have no gap": audit_checks.versions(account),
        "nothing is in flight when the source has ended": audit_checks.left_over(account),
    }
    return (_check(name, problems) for name, problems in found.items())


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
    counts = {"read": result.read, "trained": balance.trained}
    counts |= {f"dropped: {reason}": number for reason, number in sorted(balance.dropped.items())}
    counts |= {"in flight: being read": balance.reading, "in flight: scored": balance.scored}
    width = max(map(len, counts))
    lines = [f"run {result.run}: {result.equation}", ""]
    lines += [f"  {name:<{width}}  {number:>9,}" for name, number in counts.items()]
    return [*lines, "", *(f"  {check.outcome:<11}  {check.name}: {check.detail}" for check in result.checks)]


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

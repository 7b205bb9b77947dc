"""`headwater audit`: proves from the database that no document was lost or trained twice.

    read = trained + dropped (by reason) + in flight

and holds the database against everything else that knows about documents: the order of reading, the checkpoints, and
the stream. The stream of an embedded Redis is read from a copy of its append-only file, so that nothing in the run
folder is touched and no run need be up.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sqlalchemy import Engine

from cli import audit_checks
from cli.audit_stream import StreamUnreachable, documents_on_stream
from cli.checkpoint_states import read_states
from cli.run_folder import RunFolder, find_run
from shared.database import migrate, open_database
from shared.ledger import Balance, Ledger
from shared.settings import Settings

Outcome = Literal["holds", "fails", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was held against another."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class AuditResult:
    run: str
    balance: Balance
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.outcome != "fails" for check in self.checks)


def audit(run: str, *, as_json: bool) -> int:
    """Print the findings; 1 when something does not balance."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder, settings = find_run(run)
    engine = open_database(settings.database_url)
    try:
        migrate(engine)
        result = audit_run(engine, settings, folder)
    finally:
        engine.dispose()
    print(json.dumps(as_data(result), indent=2) if as_json else "\n".join(as_lines(result)))
    return 0 if result.holds else 1


def audit_run(engine: Engine, settings: Settings, folder: RunFolder) -> AuditResult:
    run_id = settings.run.name
    states = read_states(folder.checkpoints)
    checks = [
        _check("positions of each part and epoch have no gap", audit_checks.gaps(engine, run_id)),
        _check("windows of each document have no gap", audit_checks.window_gaps(engine, run_id)),
        _check(
            "trained documents are in a checkpoint",
            audit_checks.trained_beyond(engine, run_id, newest_step=max(states, default=0)),
        ),
        _check("no document is in two checkpoints", audit_checks.repeated(states)),
        _check("documents of the checkpoints are marked so", audit_checks.unmarked(engine, run_id, states)),
        _check_stream(engine, settings, folder),
    ]
    balance = Ledger(engine, run_id).balance()
    return AuditResult(run_id, balance, (_check_balance(balance), *checks))


def as_data(result: AuditResult) -> dict[str, object]:
    """What `--json` prints."""
    balance = result.balance
    return {
        "run": result.run,
        "holds": result.holds,
        "read": balance.read,
        "trained": balance.trained,
        "dropped": balance.dropped,
        "in_flight": {"reading": balance.reading, "scored": balance.scored},
        "checks": [asdict(check) for check in result.checks],
    }


def as_lines(result: AuditResult) -> list[str]:
    balance = result.balance
    lines = [f"run {result.run}: {balance_line(balance)}", ""]
    counts = [("read", balance.read), ("trained", balance.trained)]
    counts += [(f"dropped: {reason}", number) for reason, number in sorted(balance.dropped.items())]
    counts += [("in flight: being read", balance.reading), ("in flight: scored", balance.scored)]
    width = max(len(name) for name, _ in counts)
    lines += [f"  {name:<{width}}  {number:>9,}" for name, number in counts]
    lines.append("")
    lines += [f"  {check.outcome:<11}  {check.name}: {check.detail}" for check in result.checks]
    return lines


def balance_line(balance: Balance) -> str:
    """The conservation law of one run in a sentence."""
    dropped = sum(balance.dropped.values())
    sign = "=" if balance.holds else "is NOT"
    return (
        f"{balance.read} windows read {sign} {balance.trained} trained + {dropped} dropped + "
        f"{balance.in_flight} in flight"
    )


def _check_balance(balance: Balance) -> Check:
    return Check("documents are conserved", "holds" if balance.holds else "fails", balance_line(balance))


def _check(name: str, problems: Sequence[str]) -> Check:
    if not problems:
        return Check(name, "holds", "all of them")
    shown = "; ".join(problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return Check(name, "fails", shown + more)


def _check_stream(engine: Engine, settings: Settings, folder: RunFolder) -> Check:
    name = "scored documents are on the stream"
    before = audit_checks.scored(engine, settings.run.name)
    try:
        on_stream = documents_on_stream(settings, folder)
    except StreamUnreachable as exc:
        return Check(name, "not checked", str(exc))
    # a document that moved on while the stream was read is no contradiction
    still_scored = before & audit_checks.scored(engine, settings.run.name)
    return _check(name, [f"document {key} is not" for key in sorted(still_scored - on_stream)])

"""The last lines of `headwater run`: steps, documents, the audit's verdict, and where everything lies."""

from sqlalchemy import Engine

from cli.audit import AuditResult, audit_run, balance_line
from cli.run_folder import RunFolder
from shared.checkpoint_state import newest_checkpoint
from shared.settings import Settings


def summary_lines(engine: Engine, settings: Settings, folder: RunFolder) -> list[str]:
    """Call it when the processes have stopped."""
    result = audit_run(engine, settings, folder)
    newest = newest_checkpoint(folder.checkpoints)
    told = [check for check in result.checks if check.outcome != "holds"]
    lines = [
        f"step {newest[0] if newest else 0} of {settings.trainer.steps}"
        + ("" if newest and newest[0] >= settings.trainer.steps else "; the same command goes on from here"),
        f"documents: {balance_line(result)}",
        f"audit: {_verdict(result)}",
    ]
    lines += [f"  {check.outcome}: {check.name}: {check.detail}" for check in told]
    lines.append(f"checkpoint: {newest[1] if newest else 'none yet'}")
    return lines


def _verdict(result: AuditResult) -> str:
    if not result.holds:
        return "it does NOT balance"
    return (
        "nothing contradicts itself, but not everything could be checked" if result.unchecked else "everything balances"
    )

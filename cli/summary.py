"""The last lines of `headwater run`: steps, documents, the audit's verdict, and where everything lies."""

from sqlalchemy import Engine

from cli.audit import audit_run, balance_line
from cli.checkpoint_states import newest_checkpoint
from cli.run_folder import RunFolder
from shared.settings import Settings


def summary_lines(engine: Engine, settings: Settings, folder: RunFolder) -> list[str]:
    """Call it when the processes have stopped."""
    result = audit_run(engine, settings, folder)
    newest = newest_checkpoint(folder.checkpoints)
    failed = [check for check in result.checks if check.outcome == "fails"]
    lines = [
        f"step {newest[0] if newest else 0} of {settings.trainer.steps}"
        + ("" if newest and newest[0] >= settings.trainer.steps else "; the same command goes on from here"),
        f"documents: {balance_line(result)}",
        f"audit: {'everything balances' if result.holds else 'it does NOT balance'}",
    ]
    lines += [f"  {check.name}: {check.detail}" for check in failed]
    lines.append(f"checkpoint: {newest[1] if newest else 'none yet'}")
    return lines

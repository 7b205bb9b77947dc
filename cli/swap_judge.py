"""`headwater swap-judge`: gives the judge of a running compose stack other settings, and nobody else notices.

    settings read -> compose makes the judge's container anew -> kept in .env -> asked until it is ready -> report

The collector waits and retries meanwhile; chunks judged from then on carry the new fingerprint. In Kubernetes the same
is `kubectl apply` of an overlay that changes the judge's ConfigMap.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cli.compose_stack import ComposeError, ComposeStack, Part
from shared.configuration import load_settings
from shared.errors import SettingsError

VARIABLE = "STACK_JUDGE_CONFIG"
"""docker-compose.yml mounts this file for the judge."""
READY_URL = "http://127.0.0.1:8003/readyz"
_LOOK_EVERY_S = 1.0


class JudgeStack(Protocol):
    """What swapping needs of a stack."""

    folder: Path
    project: str

    @property
    def env_file(self) -> Path: ...

    def parts(self, service: str, *, ready_url: str) -> list[Part]: ...

    def make_anew(self, service: str, environ: Mapping[str, str], *, timeout_s: float) -> None: ...

    def log(self, service: str) -> list[str]: ...


@dataclass(frozen=True)
class Swap:
    """What was found and what came of it."""

    before: Sequence[Part]
    after: Sequence[Part]
    seconds: float


def swap_judge(settings_file: Path, *, project: str, timeout_s: float) -> int:
    """Exit code 0 once the judge is ready. Raises HeadwaterError with the judge's log and the way back."""
    load_settings(settings_file, environ={})  # a mistake must not cost the judge that works
    stack = ComposeStack(project)
    mounted = mounted_path(settings_file, stack.folder)
    swap = swap_in(stack, mounted, timeout_s=timeout_s)
    print("\n".join(report(swap, mounted, project=project, env_file=stack.env_file)))
    return 0


def swap_in(stack: JudgeStack, mounted: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> Swap:
    """Replace the judge and wait. Raises ComposeError when it ended, or was not ready within `timeout_s`."""
    began = clock()
    before = stack.parts("judge", ready_url=READY_URL)
    if not before:
        raise ComposeError(f"compose project {stack.project!r} has no judge: `docker compose up -d judge` starts one")
    stack.make_anew("judge", {VARIABLE: mounted}, timeout_s=timeout_s)
    keep_variable(stack.env_file, VARIABLE, mounted)  # the next `docker compose up` keeps this judge
    old = {part.id for part in before}
    while True:
        after = [part for part in stack.parts("judge", ready_url=READY_URL) if part.id not in old]
        if len(after) >= len(before) and all(part.readiness.get("ready") for part in after):
            return Swap(before, after, clock() - began)
        ended = next((part for part in after if part.has_ended), None)
        if ended is not None:
            raise _failure(stack, before, _how_it_ended(ended))
        if clock() - began > timeout_s:
            raise _failure(stack, before, f"it did not become ready within {timeout_s:g} s")
        time.sleep(_LOOK_EVERY_S)


def report(swap: Swap, mounted: str, *, project: str, env_file: Path) -> list[str]:
    old, new = _shown(swap.before, "fingerprint"), _shown(swap.after, "fingerprint")
    lines = [
        f"the judge of {project} is ready, {swap.seconds:.1f} s after the swap began",
        f"  fingerprint  {old} -> {new}",
        f"  model        {_shown(swap.before, 'model')} -> {_shown(swap.after, 'model')}",
        f"  settings     {swap.before[0].settings_file or 'unknown'} -> {mounted} ({VARIABLE} in {env_file})",
    ]
    if old == new:
        lines.append("The fingerprint is the same: these settings judge as the ones before did.")
    return lines


def mounted_path(settings_file: Path, folder: Path) -> str:
    """As compose wants it in .env: below the project's folder `./...`, elsewhere absolute."""
    path = settings_file.resolve()
    shown = f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)
    if any(character in shown for character in ":'\n$"):
        raise SettingsError(f"{shown!r} can't be mounted by compose: give the file a path without : ' $ and line ends")
    return shown


def keep_variable(env_file: Path, name: str, value: str) -> None:
    """Set `name` in an .env file, everything else as it was; the file stays readable by its owner alone."""
    lines = env_file.read_text(encoding="utf-8").splitlines() if env_file.exists() else []
    kept = [line for line in lines if not line.strip().startswith(f"{name}=")]
    temporary = env_file.with_name(f"{env_file.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join([*kept, f"{name}='{value}'"]) + "\n")
    temporary.replace(env_file)


def _how_it_ended(part: Part) -> str:
    if part.status == "running":
        return f"it ended before it was ready and was started again, {part.num_restarts} times by now"
    return f"it ended with exit status {part.exit_code} before it was ready"


def _failure(stack: JudgeStack, before: Sequence[Part], why: str) -> ComposeError:
    log = "\n".join(f"    {line}" for line in stack.log("judge"))
    way_back = before[0].settings_file or "the settings it had"
    return ComposeError(
        f"the new judge is not in service: {why}. The run waits for it and loses nothing. Back to the old one:\n"
        f"    headwater swap-judge {way_back} --project {stack.project}\n"
        f"The judge's last log lines:\n{log}"
    )


def _shown(parts: Sequence[Part], key: str) -> str:
    return ", ".join(sorted({str(part.readiness.get(key) or "unknown") for part in parts}))

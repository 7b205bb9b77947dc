"""`headwater check`: validates a configuration, reaches everything that it names, and says what would run.

Lists every problem, not just the first. Starts nothing and writes nothing.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from cli.plan import Plan, make_plan, needed_services
from cli.ports import Ports
from cli.probes import Probe, probes
from shared.configuration import load_settings
from shared.errors import HeadwaterError, SettingsError
from shared.secret_urls import without_secrets


def check(config: Path, overrides: Sequence[str]) -> int:
    """0 when a run could start; 1 with all problems listed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        settings = load_settings(config, overrides)
    except SettingsError as exc:
        return _fail(str(exc).splitlines())
    with Ports() as ports:
        plan = make_plan(settings, ports)
        problems = [problem for probe in probes(plan) if (problem := _try(probe))]
        for line in plan_lines(plan):
            print(without_secrets(line))
    return _fail(problems) if problems else 0


def plan_lines(plan: Plan) -> list[str]:
    """What would run: one line a process, with where it listens."""
    settings = plan.settings
    rows = []
    if plan.embedded_redis_port is not None:
        rows.append(("redis", "embedded, a free port of 127.0.0.1"))
    for role in plan.roles:
        url = plan.ready_url(role)
        where = url.removesuffix("/readyz") if url else f"{settings.trainer.objective} to step {settings.trainer.steps}"
        rows.append((role, where))
    elsewhere = [(role, plan.service(role).url) for role in needed_services(settings) if plan.service(role).url]
    lines = ["", f"would start {plan.num_processes} processes:"]
    lines += [f"  {role:<10} {where}" for role, where in rows]
    lines += [f"  {role:<10} runs elsewhere: {url}" for role, url in elsewhere]
    return lines + [f"  {note}" for note in plan.notes]


def _try(probe: Probe) -> str | None:
    """The problem, or None when the probe is content."""
    try:
        found = probe.run()
    except HeadwaterError as exc:
        print(f"  NO   {probe.name:<16} {exc}")
        return f"{probe.name}: {exc}"
    print(f"  ok   {probe.name:<16} {without_secrets(found)}")
    return None


def _fail(problems: Sequence[str]) -> int:
    print(f"\n{len(problems)} problem{'s' if len(problems) != 1 else ''}:")
    for problem in problems:
        print(f"  - {problem}")
    return 1

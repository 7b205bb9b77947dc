"""The form that every benchmark's result has: a table for people, JSON for machines, an exit code for goals."""

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

_VERSIONS = ("torch", "transformers", "redis", "fastapi", "pydantic")


@dataclass(frozen=True)
class Goal:
    """A figure and the bound it must keep; `value` is None where it could not be measured here."""

    name: str
    value: float | None
    goal: str
    met: bool | None


@dataclass
class Report:
    """Figures and goals of one benchmark."""

    figures: dict[str, float | str] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.figures[name] = value
        self.goals.append(Goal(name, value, f">= {bound:g}", value >= bound))

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.figures[name] = value
        self.goals.append(Goal(name, value, f"<= {bound:g}", value <= bound))

    def finish(self, json_file: Path | None) -> int:
        """Print the table, write the JSON, return the exit code."""
        for name, value in self.figures.items():
            print(f"{name:<52} {value if isinstance(value, str) else f'{value:,.4g}'}")
        for goal in self.goals:
            print(f"goal {goal.name} {goal.goal}: {'met' if goal.met else 'MISSED'}")
        if json_file:
            json_file.write_text(json.dumps(self._as_json(), indent=2) + "\n", encoding="utf-8")
        return 1 if any(goal.met is False for goal in self.goals) else 0

    def _as_json(self) -> dict[str, object]:
        return {
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
            "figures": self.figures,
            "goals": [asdict(goal) for goal in self.goals],
        }


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the two options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a smaller run, for a first look")
    made.add_argument("--json", type=Path, help="write figures and goals to this file")
    return made

"""All PromQL that Headwater ships: alerts, dashboards, autoscalers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "monitoring"
RULES_FILE = MONITORING / "prometheus" / "rules" / "headwater.yml"
PROMETHEUS_FILE = MONITORING / "prometheus" / "prometheus.yml"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
RATE_INTERVAL = "40s"
"""What Grafana puts for $__rate_interval at a scrape interval of 10 s."""


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    place: str
    expression: str

    def __str__(self) -> str:
        return self.place


def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    return loaded


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def dashboard(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def alert_queries() -> list[Query]:
    return [Query(rule["alert"], rule["expr"]) for rule in alerts()]


def dashboard_queries() -> list[Query]:
    """With Grafana's variables replaced, as it does before it asks."""
    found = []
    for path in DASHBOARDS:
        content = dashboard(path)
        targets = [(panel["title"], one["expr"]) for panel in content["panels"] for one in panel.get("targets", [])]
        targets += [(annotation["name"], annotation["expr"]) for annotation in content["annotations"]["list"]]
        for title, expression in targets:
            found.append(Query(f"{path.stem}: {title}", expression.replace("$__rate_interval", RATE_INTERVAL)))
    return found


def scaling_queries() -> list[Query]:
    found = []
    for path in sorted((ROOT / "k8s" / "components").glob("*/scaledobject.yaml")):
        scaled = yaml.safe_load(path.read_text(encoding="utf-8"))
        found += [Query(path.parent.name, trigger["metadata"]["query"]) for trigger in scaled["spec"]["triggers"]]
    return found


def all_queries() -> list[Query]:
    return alert_queries() + dashboard_queries() + scaling_queries()


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Every series selector of the expression. Raises ValueError if it is not PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found

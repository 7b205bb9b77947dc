"""Every query names series that the processes really serve, by labels and values that exist."""

import re
from pathlib import Path

import prometheus_client
import promql_parser
import pytest

from shared import metrics
from shared.records import CANDIDATE_KINDS
from tests.monitoring.queries import DASHBOARDS, Query, all_queries, dashboard, selectors
from trainer.figures import FIGURES

PROMETHEUS_OWN = {"up": {"job", "instance"}}
ADDED_BY_SCRAPING = {"job", "instance", "namespace"}
VALUES: dict[str, set[str]] = {"job": set(metrics.ROLES), "kind": set(CANDIDATE_KINDS), "name": set(FIGURES)}


def served() -> dict[str, set[str]]:
    """Name of a series -> its labels."""
    found = dict(PROMETHEUS_OWN)
    for metric in vars(metrics).values():
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase):
            [family] = metric.describe()
            labels = set(metric._labelnames)
            if family.type == "histogram":
                found |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
                found[f"{family.name}_bucket"] = labels | {"le"}
            else:
                found[f"{family.name}_total" if family.type == "counter" else family.name] = labels
    process = prometheus_client.ProcessCollector(registry=None)
    return found | {sample.name: set() for family in process.collect() for sample in family.samples}


SERVED = served()


def matching(matcher: promql_parser.Matcher) -> set[str]:
    """Which of the label's known values the matcher selects."""
    known = VALUES[matcher.name]
    if matcher.op == promql_parser.MatchOp.Equal:
        return known & {matcher.value}
    assert matcher.op == promql_parser.MatchOp.Re
    return {value for value in known if re.fullmatch(matcher.value, value)}


@pytest.mark.parametrize("query", all_queries(), ids=str)
def test_queries_ask_for_what_is_served(query: Query) -> None:
    found = selectors(query.expression)
    assert found, "a query without a series"
    for selector in found:
        assert selector.name in SERVED, selector.name
        for matcher in selector.matchers.matchers:
            assert matcher.name in SERVED[selector.name] | ADDED_BY_SCRAPING, (selector.name, matcher.name)
            if matcher.name in VALUES:
                assert matching(matcher), matcher


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_whole_and_panels_do_not_overlap(path: Path) -> None:
    content = dashboard(path)
    taken: set[tuple[int, int]] = set()
    assert content["uid"] == path.stem
    numbers = [panel["id"] for panel in content["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in content["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= 24 - place["w"], panel["title"]
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells

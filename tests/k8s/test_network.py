"""The NetworkPolicies allow exactly the arrows of README.md's picture, and a person with tools."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shared.metrics import ROLES
from tests.k8s.rendering import (
    COMPONENT,
    OVERLAYS,
    Manifest,
    find,
    of_kind,
    overlay,
    port_of,
    with_components,
    workload,
    workloads,
)

Arrow = tuple[str, str, int]
ARROWS: set[Arrow] = {
    ("collector", "rollout", 8001),
    ("collector", "rewriter", 8002),
    ("collector", "judge", 8003),
    *((user, "redis", 6379) for user in ("collector", "rollout", "trainer", "tools")),
    *((user, "postgres", 5432) for user in ("collector", "rollout", "trainer", "tools")),
}


def selects(selector: Manifest, role: str) -> bool:
    """Whether a pod selector of ours selects the role's pods: an empty one selects all."""
    labels = selector.get("matchLabels", {})
    assert labels.keys() <= {COMPONENT}, selector
    if role != labels.get(COMPONENT, role):
        return False
    for expression in selector.get("matchExpressions", []):
        assert (expression["key"], expression["operator"]) == (COMPONENT, "In"), selector
        if role not in expression["values"]:
            return False
    return True


def ends(policies: Sequence[Manifest], role: str, direction: str) -> Iterator[tuple[Manifest, int]]:
    """(peer, port) of every rule about the role's pods; direction is `ingress` or `egress`."""
    for policy in policies:
        if selects(policy["spec"]["podSelector"], role):
            for rule in policy["spec"].get(direction, []):
                for peer in rule["to" if direction == "egress" else "from"]:
                    for port in rule["ports"]:
                        yield peer, port["port"]


def arrows(manifests: Sequence[Manifest]) -> set[Arrow]:
    """What goes through between pods of the stack: let out at one end and let in at the other."""
    policies = of_kind(manifests, "NetworkPolicy")
    roles = [role for role, _ in workloads(manifests)]

    def peers(role: str, direction: str) -> set[tuple[str, int]]:
        return {
            (other, port)
            for peer, port in ends(policies, role, direction)
            if peer.keys() == {"podSelector"}
            for other in roles
            if selects(peer["podSelector"], other)
        }

    outgoing = {(role, other, port) for role in roles for other, port in peers(role, "egress")}
    incoming = {(other, role, port) for role in roles for other, port in peers(role, "ingress")}
    assert outgoing == incoming, "an arrow that is open at one end only"
    return outgoing


@pytest.mark.parametrize("name", OVERLAYS)
def test_exactly_the_arrows_that_exist_end_at_ports_that_listen_and_all_else_is_shut(name: str) -> None:
    assert arrows(overlay(name)) == ARROWS
    for _, role, port in ARROWS:
        [main] = workload(overlay(name), role)["containers"]
        assert port in {one["containerPort"] for one in main["ports"]}, role
    spec = find(overlay(name), "NetworkPolicy", "nothing-else")["spec"]
    assert (spec["podSelector"], sorted(spec["policyTypes"])) == ({}, ["Egress", "Ingress"])
    assert not {"ingress", "egress"} & spec.keys()


def outside(manifests: Sequence[Manifest], role: str, direction: str) -> set[tuple[str, int]]:
    """(address range or namespace, port) beyond the stack."""
    found = set()
    for peer, port in ends(of_kind(manifests, "NetworkPolicy"), role, direction):
        if "ipBlock" in peer:
            found.add((peer["ipBlock"]["cidr"], port))
        if "namespaceSelector" in peer:
            found.add((peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port))
    return found


def test_on_a_laptop_nothing_leaves_the_namespace_but_questions_to_dns() -> None:
    for role, _ in workloads(overlay("cpu")):
        assert outside(overlay("cpu"), role, "egress") == {("kube-system", 53)}
        assert outside(overlay("cpu"), role, "ingress") == set()


def test_components_open_what_they_are_for(tmp_path: Path) -> None:
    components = ["monitoring", "s3-weights", "managed-redis", "managed-postgres"]
    manifests = with_components(tmp_path, "cpu", components)
    assert arrows(manifests) == {arrow for arrow in ARROWS if arrow[1] not in ("redis", "postgres")}
    dns, redis = ("kube-system", 53), {("0.0.0.0/0", 6379), ("0.0.0.0/0", 6380)}
    postgres, store = {("0.0.0.0/0", 5432)}, {("0.0.0.0/0", 443)}
    assert outside(manifests, "rewriter", "egress") == outside(manifests, "judge", "egress") == {dns}
    assert outside(manifests, "collector", "egress") == {dns, *redis, *postgres}
    for role in ("rollout", "trainer"):
        assert outside(manifests, role, "egress") == {dns, *redis, *postgres, *store}
    for role in ROLES:
        assert ("monitoring", port_of(manifests, role)) in outside(manifests, role, "ingress"), role

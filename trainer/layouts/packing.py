"""Divides a step's windows (tree) or pairs (separate) among ranks and passes. Called by both layouts.

Passes are runs of units sorted by size, cut at the lowest ceiling that needs no more passes than `max_tokens` does, so
they are nearly equal. The largest go out first, one to each rank in turn and back again. Everything follows from the
units alone: the same windows always give the same passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainer.layouts.base import PassPlan, WindowPairs

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Unit:
    """What is never divided: a window or a part of it (tree), or a pair (separate)."""

    pairs: WindowPairs
    size: int
    """In tokens, for the order and for `Cost`."""


Cost = Callable[[Sequence[Unit]], int]
"""Tokens of one pass over these units. It never falls when a unit is added."""


def plan_passes(units: Sequence[Unit], cost: Cost, *, max_tokens: int, num_ranks: int) -> list[list[PassPlan]]:
    """By rank its passes, equally many for each. A pass of several units has at most `max_tokens`. Where there are
    fewer units than passes, a rank gets a copy that does not count."""
    if not units:
        return [[] for _ in range(num_ranks)]
    ordered = sorted(units, key=lambda unit: unit.size, reverse=True)
    num_passes = -(-len(cut(ordered, cost, ceiling=max_tokens)) // num_ranks) * num_ranks
    ceiling = _lowest_ceiling(ordered, cost, max_tokens=max_tokens, num_passes=num_passes)
    groups = sorted(_halved(cut(ordered, cost, ceiling=ceiling), num_passes), key=cost, reverse=True)
    plans = [PassPlan(tuple(unit.pairs for unit in group)) for group in groups]
    copy = PassPlan(plans[-1].windows, counted=False)
    return _deal([*plans, *[copy] * (num_passes - len(plans))], num_ranks)


def cut(items: Sequence[_Item], cost: Callable[[Sequence[_Item]], int], *, ceiling: int) -> list[list[_Item]]:
    """Neighbours together as long as they cost at most `ceiling`; an item that costs more is by itself."""
    groups: list[list[_Item]] = []
    for item in items:
        if groups and cost([*groups[-1], item]) <= ceiling:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _lowest_ceiling(units: Sequence[Unit], cost: Cost, *, max_tokens: int, num_passes: int) -> int:
    """By bisection: a higher ceiling never needs more passes."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(cut(units, cost, ceiling=middle)) <= num_passes:
            high = middle
        else:
            low = middle + 1
    return high


def _halved(groups: list[list[Unit]], num_passes: int) -> list[list[Unit]]:
    """Halve the one of the most units until there are `num_passes`, or only single units are left."""
    while len(groups) < num_passes and len(most := max(groups, key=len)) > 1:
        groups.remove(most)
        groups += [most[: len(most) // 2], most[len(most) // 2 :]]
    return groups


def _deal(plans: Sequence[PassPlan], num_ranks: int) -> list[list[PassPlan]]:
    """In rounds, every other one backwards: the passes of a round are about equal, and so are the sums."""
    rounds = [plans[begin : begin + num_ranks] for begin in range(0, len(plans), num_ranks)]
    dealt = [one[::-1] if index % 2 else one for index, one in enumerate(rounds)]
    return [[one[rank] for one in dealt] for rank in range(num_ranks)]

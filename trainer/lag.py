"""Policy lag: how many optimizer steps old the weights are that a rollout was sampled from. Used by inbox and replicas.

    published = PublishedSteps(publisher.steps)              # weight version -> step: {0: 0, 1: 1, 2: 1, 3: 2}
    published.lag([1, 3], step=4)                            # update 4 follows 3 completed steps: 3 - 1 = 2

Versions can't be counted instead: a resumed trainer publishes the weights of an old step under a new number, and a slow
publisher leaves steps out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSteps:
    by_version: Mapping[int, int]
    """After which step each weight version was published. It grows while the publisher works, in another thread."""

    @property
    def newest_version(self) -> int:
        """At least 0, which is also the version of a replica that has loaded nothing yet."""
        return max((0, *self.by_version))

    def step_of(self, version: int) -> int:
        """Of a version that is not known, the step of the nearest lower one; 0 below all."""
        known = self.by_version.get(version)
        if known is not None:
            return known
        lower = [other for other in tuple(self.by_version) if other < version]
        return self.by_version[max(lower)] if lower else 0

    def lag(self, versions: Iterable[int], *, step: int) -> int:
        """Completed steps before update `step`, less the step of the oldest weights among `versions`.

        Never negative: after a resume from an earlier checkpoint, rollouts may come from weights of a later step.
        """
        oldest = min(self.step_of(version) for version in set(versions))
        return max(0, step - 1 - oldest)

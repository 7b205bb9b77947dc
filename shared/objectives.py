"""The training objectives, one row each.

    OBJECTIVES["dpo"].judged            # True: the collector asks the judge
    OBJECTIVES["sft_rewrite"].kinds     # frozenset({"rewrite"}): every chunk needs one

To add an objective, add a row and, if no function fits, one to trainer/preferences.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from shared.records import CandidateKind


@dataclass(frozen=True)
class Objective:
    choice: str
    """A function of trainer/preferences.py that picks chosen and rejected, or the kind of the one candidate to take."""
    loss: Literal["dpo", "nll"]
    judged: bool = False
    """It chooses by reward."""
    kinds: frozenset[CandidateKind] = frozenset()
    """Candidates that every chunk must have."""
    takes_lone_candidate: bool = False
    """Judged only: a chunk with one candidate needs no judge and gives a pair, unless that candidate is a rollout."""


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective("highest_over_lowest", "dpo", judged=True),
    "rf_nll": Objective("highest", "nll", judged=True, takes_lone_candidate=True),
    "sft_rewrite": Objective("rewrite", "nll", kinds=frozenset({"rewrite"})),
    "sft_rollout": Objective("rollout", "nll", kinds=frozenset({"rollout"})),
    "dpo_rewrite_over_rollout": Objective("rewrite_over_rollout", "dpo", kinds=frozenset({"rewrite", "rollout"})),
    "next_token": Objective("original", "nll", kinds=frozenset({"original"})),
}


def _known(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"no objective is called {name!r}: choose one of {', '.join(OBJECTIVES)}")
    return name


ObjectiveName = Annotated[str, AfterValidator(_known)]

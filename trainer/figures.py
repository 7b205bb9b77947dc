"""The names of all step figures in one place, and how one step's figures come together.

The same names stand in the database (StepRow.figures), in TensorBoard, in Weights & Biases and as labels of the
`headwater_training_figure` gauge. A figure that has no value in a step (the mean reward of rollouts where there were
none) is absent, never zero.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import ConfigDict

from shared.records import CANDIDATE_KINDS, Record, ScoredDocument
from trainer.preferences import Preference, Selection, rewards_by_kind

FIGURES: dict[str, str] = {
    "loss": "the objective, normalised by the step's global count (pairs for DPO, suffix tokens for NLL)",
    "reward_margin": "DPO: mean of beta * ((chosen - reference) - (rejected - reference)) log-probs",
    "reward_accuracy": "DPO: share of pairs with a positive margin",
    "chosen_log_prob": "mean summed log-prob of the chosen suffixes under the policy",
    "rejected_log_prob": "DPO: the same of the rejected suffixes",
    "reference_chosen_log_prob": "DPO: the chosen suffixes under the reference",
    "reference_rejected_log_prob": "DPO: the rejected suffixes under the reference",
    "chosen_original_rate": "share of chosen suffixes that are the original (one of two kinds counts for both: the "
    "three shares may sum to more than 1)",
    "chosen_rewrite_rate": "share of chosen suffixes that are rewrites",
    "chosen_rollout_rate": "share of chosen suffixes that are rollouts: the paper's main plot",
    "reward_original": "mean reward of all originals in the documents admitted since the step before",
    "reward_rewrite": "the same of rewrites",
    "reward_rollout": "the same of rollouts",
    "policy_lag_mean": "weight versions between the newest published and the oldest rollout of a pair's document",
    "policy_lag_max": "the largest of these in the step",
    "pairs": "pairs in the step",
    "target_tokens": "suffix tokens whose log-probs enter the loss",
    "batch_tokens": "tokens through the policy's forward pass, prefixes and padding included",
    "documents": "documents admitted since the step before",
    "no_preference_chunks": "chunks without a preference in the documents read since the step before",
    "missing_chunks": "chunks that lacked a needed candidate or judgement",
    "no_preference_documents": "documents dropped because no chunk gave a pair",
    "stale_documents": "documents dropped for their policy lag",
    "duplicate_documents": "deliveries of a document that was held or finished already",
    "broken_documents": "entries on the stream that could not be decoded",
    "skipped_steps": "steps skipped for a non-finite loss or gradient since the step before",
    "learning_rate": "of this step",
    "grad_norm": "global L2 norm before clipping",
    "seconds_wait": "waiting for documents, decoding and pairing them",
    "seconds_forward_backward": "policy and reference forward, policy backward",
    "seconds_optimizer": "clipping and AdamW",
    "seconds_push": "weights to the store, announced",
    "seconds_replicas": "looking at replicas, and waiting for late ones where `trainer.replica_wait_s` is set",
    "seconds_checkpoint": "checkpoints since the step before (a row is written before its own step's checkpoint)",
    "seconds_generate": "collector's seconds for the rollouts of the documents admitted since the step before",
    "seconds_rewrite": "the same for rewrites",
    "seconds_judge": "the same for judgements",
}


class StepFigures(Record):
    """One step's row in the database."""

    model_config = ConfigDict(ser_json_inf_nan="constants")
    at: float
    """Unix seconds."""
    policy_version: int
    figures: dict[str, float]


_COUNTS = (
    "documents",
    "no_preference_chunks",
    "missing_chunks",
    "no_preference_documents",
    "stale_documents",
    "duplicate_documents",
    "broken_documents",
    "skipped_steps",
)


@dataclass
class Tally:
    """What happened since the last row: counts, rewards by kind, seconds by role. Emptied by `drain`."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    rewards: dict[str, tuple[float, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] += number

    def add_document(self, document: ScoredDocument, selection: Selection) -> None:
        self.count("documents")
        self.count("no_preference_chunks", selection.no_preference)
        self.count("missing_chunks", selection.missing)
        for kind, (total, count) in rewards_by_kind(document).items():
            before, number = self.rewards.get(kind, (0.0, 0))
            self.rewards[kind] = (before + total, number + count)
        for role in ("generate", "rewrite", "judge"):
            if role in document.seconds:
                self.add_seconds(role, document.seconds[role])

    def add_seconds(self, role: str, seconds: float) -> None:
        self.seconds[role] = self.seconds.get(role, 0.0) + seconds

    @contextmanager
    def spending(self, role: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(role, time.perf_counter() - began)

    def drain(self) -> dict[str, float]:
        """All of it as figures; begins anew."""
        drained: dict[str, float] = {name: float(number) for name, number in self.counts.items()}
        drained |= {f"reward_{kind}": total / count for kind, (total, count) in self.rewards.items()}
        drained |= {f"seconds_{role}": seconds for role, seconds in self.seconds.items()}
        self.counts, self.rewards, self.seconds = dict.fromkeys(_COUNTS, 0), {}, {}
        return drained


def pair_figures(pairs: Sequence[Preference], *, policy_version: int) -> dict[str, float]:
    """Number, source mix and policy lag of a step's pairs."""
    chosen = [kind for pair in pairs for kind in set(pair.chosen.kinds)]
    figures: dict[str, float] = {"pairs": len(pairs)}
    figures |= {f"chosen_{kind}_rate": chosen.count(kind) / len(pairs) for kind in CANDIDATE_KINDS}
    figures["target_tokens"] = sum(len(suffix) for pair in pairs for suffix in pair.suffixes)
    lags = [policy_version - pair.policy_version for pair in pairs if pair.policy_version is not None]
    if lags:
        figures |= {"policy_lag_mean": sum(lags) / len(lags), "policy_lag_max": max(lags)}
    return figures

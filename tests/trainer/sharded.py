"""What each rank does in test_sharding.py: one start of the processes runs all checks of a number of ranks.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1234 python -m tests.trainer.sharded FOLDER CHECKPOINTS STEP

`train` trains a tiny Llama with DPO on fixed pairs from STEP on. Rank 0 saves what it found in
FOLDER/found-{number of ranks}.pt. In the end the last rank kills itself, and the others say what they then see.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shared.checkpoint_state import CheckpointState
from shared.errors import HeadwaterError
from shared.settings import Settings
from tests.trainer.windows import plain_window
from trainer.checkpoint import Checkpoints
from trainer.layouts.base import PassPlan
from trainer.layouts.separate import SeparateLayout
from trainer.losses import build_loss
from trainer.optimizer import PolicyOptimizer
from trainer.policy import Policy, load_policy
from trainer.preferences import Preference, select_pairs
from trainer.ranks import Ranks
from trainer.sharding import local
from trainer.snapshot import Snapshot

NUM_STEPS, CHECKPOINT_AT, REFRESH_AT = 6, 3, 2
_CPU = torch.device("cpu")


def settings_of(folder: Path, **trainer: Any) -> Settings:
    """`folder` holds the policy."""
    given = {"device": "cpu", "warmup_steps": 0, "learning_rate": 0.01, "steps": NUM_STEPS, "max_grad_norm": 0.5}
    return Settings.model_validate({"policy": {"model": str(folder)}, "trainer": given | trainer})


def pairs_of(step: int) -> list[Preference]:
    """Six of two windows: they divide by 1, 2 and 3 ranks."""
    windows = (plain_window(number) for number in (2 * step, 2 * step + 1))
    return [pair for one in windows for pair in select_pairs(one, "dpo", min_reward_gap=0.0, seed=0).pairs]


class Run:
    """The trainer of one rank, without a loop."""

    def __init__(self, settings: Settings, ranks: Ranks, checkpoints: Checkpoints, *, resume: bool) -> None:
        checkpoint = checkpoints.newest() if resume else None
        self.settings, self.ranks, self.checkpoints = settings, ranks, checkpoints
        self.policy: Policy = load_policy(
            settings,
            checkpoint.folder if checkpoint else None,
            with_reference=True,
            reference_step=checkpoint.state.reference_step if checkpoint else 0,
            ranks=ranks,
        )
        self.optimizer = PolicyOptimizer(self.policy.model, settings.trainer)
        if checkpoint is not None:
            checkpoint.load_optimizer(self.optimizer, ranks)

    def backward(self, step: int) -> float:
        """The loss over all ranks, each with its share of the pairs."""
        pairs = pairs_of(step)
        plan = self.ranks.scatter(
            [PassPlan((tuple(pairs[rank :: self.ranks.size]),)) for rank in range(self.ranks.size)]
        )
        one, loss = SeparateLayout().lay_out(plan, device=_CPU), build_loss(self.settings.trainer)
        assert self.policy.reference_log_probs is not None
        with torch.no_grad():
            reference = self.policy.reference_log_probs(one)
        terms = loss.terms(self.policy.log_probs(one), reference, one.num_targets)
        self.optimizer.zero_grad()
        (terms.loss_sum / len(pairs)).backward()  # type: ignore[no-untyped-call]
        return float(self.ranks.sum(terms.loss_sum)) / len(pairs)

    def train(self, first: int) -> dict[str, Any]:
        losses, norms = [], []
        for step in range(first, NUM_STEPS + 1):
            losses.append(self.backward(step))
            norms.append(self.optimizer.clip())
            self.optimizer.step(step)
            if step == REFRESH_AT:
                self.policy.refresh_reference(step)
            if step == CHECKPOINT_AT:
                self.checkpoint(step)
        self.checkpoints.wait()
        return {"losses": losses, "norms": norms, "weights": self.weights(), "moments": self.moments()}

    def checkpoint(self, step: int) -> None:
        at = self.policy.reference_step
        state = CheckpointState(number=1, after=0, step=step, weight_version=0, reference_step=at, finished={})
        self.checkpoints.begin(state if self.ranks.is_main else None, self.policy, self.optimizer)

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        snapshot = Snapshot(self.ranks.group("publication"))
        snapshot.take(self.policy.model, dtype=dtype)
        return {name: tensor.clone() for name, tensor in snapshot.tensors()}

    def moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state()
        return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in state.items()}

    @property
    def tied(self) -> bool:
        model: Any = self.policy.model
        return model.lm_head.weight is model.model.embed_tokens.weight


def computed_in_bfloat16(folder: Path, ranks: Ranks, checkpoints: Checkpoints) -> dict[str, Any]:
    """With and without activation checkpointing: the dtypes of masters, and the loss and gradients of one step."""
    found: dict[str, Any] = {}
    for recompute in (False, True):
        settings = settings_of(folder, compute_dtype="bfloat16", activation_checkpointing=recompute)
        run = Run(settings, ranks, checkpoints, resume=False)
        loss = run.backward(1)
        parameters = dict(run.policy.model.named_parameters())
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        found[f"recompute {recompute}"] = {
            "loss": loss,
            "dtypes": {str(one.dtype) for one in (*parameters.values(), *gradients.values())},
            "reference": {str(one.dtype) for one in run.policy.reference.parameters()} if run.policy.reference else {},
            "norm": run.optimizer.clip(),
        }
    return found


def checks_of_many(run: Run, folder: Path) -> dict[str, Any]:
    ranks, last = run.ranks, run.ranks.rank == run.ranks.size - 1
    found: dict[str, Any] = {
        "broadcast": ranks.broadcast({"from": ranks.rank} if ranks.is_main else None),
        "any": (ranks.any(last), ranks.any(False)),
        "sum": ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist(),
    }
    try:
        load_policy(settings_of(folder / "absent"), None, with_reference=False, ranks=ranks)
    except HeadwaterError as exc:
        found["bad folder"] = f"{type(exc).__name__}: {exc}"
    run.backward(1)
    if last:
        gradient = next(one.grad for one in run.policy.model.parameters() if one.grad is not None)
        local(gradient).fill_(float("inf"))
    found["norm"] = run.optimizer.clip()
    return found


def main(folder: Path, checkpoints_root: Path, first: int) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join("cpu")
    checkpoints = Checkpoints(checkpoints_root, keep=5, ranks=ranks)
    run = Run(settings_of(folder), ranks, checkpoints, resume=first > 1)
    found = run.train(first)
    found |= {"tied": run.tied, "rounded": run.weights(torch.bfloat16)}
    found |= {"many": checks_of_many(run, folder), "bfloat16": computed_in_bfloat16(folder, ranks, checkpoints)}
    ranks.any(False)
    if ranks.rank == ranks.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        run.backward(1)
        ranks.any(False)
    except HeadwaterError as exc:
        found["killed"] = str(exc)
    torch.save(found, folder / f"found-{ranks.size}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

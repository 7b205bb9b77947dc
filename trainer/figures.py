"""The figures of a step: their names, how they are collected, and where they are written. Used by loop.py and lead.py.

They go to the database (StepRow.figures), TensorBoard, Weights & Biases and the gauge `headwater_training_figure{name}`
under the names in FIGURES. A figure without a value in a step, such as the reward of rollouts where there were none, is
absent, never zero.
"""

import importlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared import metrics
from shared.checkpoint_state import StepFigures
from shared.configuration import without_passwords
from shared.errors import SettingsError
from shared.records import CANDIDATE_KINDS, Probe, ScoredWindow
from shared.runs import Run
from shared.settings import Settings
from trainer.preferences import Preference, Selection, rewards_by_kind
from trainer.probe_watch import ProbeWatch, probe_figures

_log = logging.getLogger(__name__)

FIGURES: dict[str, str] = {
    "loss": "the objective, normalised by the step's global count (pairs for DPO, suffix tokens for NLL)",
    "reward_margin": "DPO: mean of beta * d, as in trainer/losses.py",
    "reward_accuracy": "DPO: share of pairs with a positive margin",
    "chosen_log_prob": "mean summed log-prob of the chosen suffixes under the policy",
    "rejected_log_prob": "DPO: the same of the rejected suffixes",
    "reference_chosen_log_prob": "DPO: the chosen suffixes under the reference",
    "reference_rejected_log_prob": "DPO: the rejected suffixes under the reference",
    "chosen_nll": "with `trainer.nll_weight`: mean NLL per token of the chosen suffixes, each suffix weighing the same",
    "chosen_original_rate": "share of chosen suffixes that are originals; one of several kinds counts for each of them",
    "chosen_rewrite_rate": "share of chosen suffixes that are rewrites",
    "chosen_rollout_rate": "share of chosen suffixes that are rollouts: the paper's main plot",
    "reward_original": "mean reward of all originals in the windows admitted since the step before",
    "reward_rewrite": "the same of rewrites",
    "reward_rollout": "the same of rollouts",
    "judge_probes_spoiled": "pairs of an original and its spoiled copy that the judge told apart or called equal",
    "judge_probes_base": "pairs of an original and a rollout of weight version 0 of which it did",
    "judge_probe_accuracy": "share of originals that the judge preferred to their spoiled copies; ties count half",
    "judge_probe_human_over_base": "share of originals that it preferred to a rollout of weight version 0; ties half",
    "judge_probe_unreadable": "share of these pairs that it could say nothing about",
    "judge_probe_consistency": "share of those shown in both orders in which the same text won twice",
    "judge_probe_accuracy_first": "judge_probe_accuracy over the first probes of the run (trainer/probe_watch.py)",
    "judge_probe_accuracy_last": "the same over the last block of as many",
    "judge_probe_human_over_base_first": "judge_probe_human_over_base over the first probes of the run",
    "judge_probe_human_over_base_last": "the same over the last block of as many",
    "judge_probes_fell": "1 while some block of probes is significantly below the run's first one, else 0",
    "policy_lag_mean": "optimizer steps between the weights of the oldest rollout of a pair's window and the update",
    "policy_lag_max": "the largest of these in the step",
    "pairs": "pairs in the step",
    "target_tokens": "suffix tokens whose log-probs enter the loss",
    "batch_tokens": "tokens through the policy's forward pass, prefixes and padding included",
    "windows": "windows admitted since the step before",
    "no_preference_chunks": "chunks without a preference in the windows read since the step before",
    "missing_chunks": "chunks that lacked a needed candidate or judgement",
    "barred_chunks": "chunks without a candidate that may be chosen: all are below a threshold of the judge's",
    "barred_rate": "share of judged candidates below a threshold, which are never chosen; absent where none was judged",
    "unscored_candidates": "candidates that some criterion could not score, which are neither chosen nor rejected",
    "no_preference_windows": "windows dropped because no chunk gave a pair",
    "barred_windows": "windows dropped because most chunks without a pair were barred",
    "stale_windows": "windows dropped for their policy lag",
    "duplicate_windows": "deliveries of a window that was held or finished already",
    "broken_windows": "entries on the stream that could not be decoded",
    "skipped_steps": "steps skipped for a non-finite loss or gradient since the step before",
    "learning_rate": "of this step",
    "grad_norm": "global L2 norm before clipping",
    "tokens_per_second": "batch_tokens over the seconds since the step before, its waiting included",
    "pairs_per_second": "the same of pairs",
    "windows_per_second": "the same of the step's windows",
    "saved_token_share": "1 - batch_tokens / tokens of separate sequences; the separate layout has its padding below 0",
    "mfu": "model FLOPs over the bf16 peak of all GPUs, in the seconds of forward, backward and optimizer",
    "peak_memory_bytes": "highest of rank 0 since it began: allocated on the GPU; on a CPU the resident set",
    "seconds_forward_backward": "policy and reference forward, policy backward",
    "seconds_optimizer": "clipping and AdamW",
    "seconds_wait_windows": "until the next step's windows were there",
    "seconds_wait_publish": "copying the weights for the publisher",
    "seconds_wait_checkpoint": "copying the state for a checkpoint, and waiting for the one before",
    "seconds_wait_replicas": "looking at replicas, and waiting for late ones where `trainer.replica_wait_s` is set",
    "seconds_wait_ranks": "until all ranks were at the boundary of the step",
    "seconds_rollout": "collector's seconds for the rollouts of the windows admitted since the step before",
    "seconds_rewrite": "the same for rewrites",
    "seconds_judge": "the same for judgements",
}
_COUNTS: tuple[str, ...] = ("windows", "no_preference_chunks", "missing_chunks", "barred_chunks")
_COUNTS += ("unscored_candidates", "no_preference_windows", "barred_windows")
_COUNTS += ("stale_windows", "duplicate_windows", "broken_windows", "skipped_steps")


@dataclass
class Tally:
    """What happened since the last row. Emptied by `drain`."""

    counts: Counter[str] = field(default_factory=Counter)
    rewards: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Sum and number by kind of candidate."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By role."""
    probes: list[Probe] = field(default_factory=list)

    def add_window(self, window: ScoredWindow, selection: Selection) -> None:
        self.counts.update(windows=1, no_preference_chunks=selection.no_preference, missing_chunks=selection.missing)
        self.counts.update(barred_chunks=selection.barred)
        for judgement in (chunk.judgement for chunk in window.chunks if chunk.judgement):
            self.counts.update(judged=len(judgement.rewards), barred=len(judgement.barred))
            self.counts.update(unscored_candidates=judgement.rewards.count(None))
        for kind, (total, count) in rewards_by_kind(window).items():
            before, number = self.rewards.get(kind, (0.0, 0))
            self.rewards[kind] = (before + total, number + count)
        self.probes += window.probes
        for role, seconds in window.seconds.items():
            self.add_seconds(role, seconds)

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
        """All of it as figures; the tally is empty afterwards."""
        drained = {name: float(self.counts[name]) for name in _COUNTS}
        if judged := self.counts["judged"]:
            drained["barred_rate"] = self.counts["barred"] / judged
        drained |= {f"reward_{kind}": total / count for kind, (total, count) in self.rewards.items()}
        drained |= {f"seconds_{role}": seconds for role, seconds in self.seconds.items()}
        drained |= probe_figures(self.probes)
        for one in (self.counts, self.rewards, self.seconds, self.probes):
            one.clear()
        return drained


class Taken(Protocol):
    """What a step takes: TakenWindow (inbox.py)."""

    @property
    def pairs(self) -> Sequence[Preference]: ...
    @property
    def lag(self) -> int | None: ...


def window_figures(windows: Sequence[Taken]) -> dict[str, float]:
    """Number, source mix and policy lag of the pairs of a step's windows."""
    pairs = [pair for window in windows for pair in window.pairs]
    chosen = [kind for pair in pairs for kind in set(pair.chosen.kinds)]
    figures: dict[str, float] = {"pairs": len(pairs)}
    figures |= {f"chosen_{kind}_rate": chosen.count(kind) / len(pairs) for kind in CANDIDATE_KINDS}
    figures["target_tokens"] = sum(len(suffix) for pair in pairs for suffix in pair.suffixes)
    lags = [window.lag for window in windows if window.lag is not None for _ in window.pairs]
    if lags:
        figures |= {"policy_lag_mean": sum(lags) / len(lags), "policy_lag_max": max(lags)}
    return figures


class Sink(Protocol):
    def write(self, step: int, weight_version: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Telemetry:
    """What the loop counts, and where its figures go."""

    run: Run
    sinks: list[Sink]
    tally: Tally = field(default_factory=Tally)
    watch: ProbeWatch = field(default_factory=ProbeWatch)

    def drain(self) -> dict[str, float]:
        """What was counted since the last row, and what the judge's probes say by now."""
        drained = self.tally.drain()
        return drained | self.watch.note(drained)

    def write(self, step: int, weight_version: int, figures: Mapping[str, float]) -> None:
        """The database first: it is the record, the others are views. A step redone after a crash replaces its row."""
        self.run.record_step(step, StepFigures(at=time.time(), weight_version=weight_version, figures=dict(figures)))
        metrics.step.set(step)
        metrics.weight_version.set(weight_version)
        metrics.trained_tokens_total.inc(figures.get("target_tokens", 0))
        for name, value in figures.items():
            metrics.training_figure.labels(name).set(value)
        for sink in self.sinks:
            sink.write(step, weight_version, figures)
        for fall in self.watch.take_falls():
            _log.warning("step %d: %s", step, fall)
            self.run.record_event("trainer", "judge_probes_fell", f"step {step}: {fall}", step=step)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_telemetry(settings: Settings, run: Run, *, resume_step: int) -> Telemetry:
    sinks: list[Sink] = []
    if settings.trainer.log_tensorboard:
        sinks.append(TensorBoardSink(settings.run.folder / "tensorboard", resume_step=resume_step))
    if settings.trainer.log_wandb:
        sinks.append(WandbSink(settings))
    watch = ProbeWatch.resumed(run.figures() if settings.judge.probe_share else ())
    return Telemetry(run, sinks, watch=watch)


class TensorBoardSink:
    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Hides events beyond `resume_step`: those steps are redone."""
        tensorboard = _optional("torch.utils.tensorboard", extra="tensorboard")
        self._writer = tensorboard.SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1)

    def write(self, step: int, weight_version: int, figures: Mapping[str, float]) -> None:
        for name, value in {"weight_version": weight_version, **figures}.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, settings: Settings) -> None:
        name = settings.run.name
        config = without_passwords(settings).model_dump(mode="json")
        wandb = _optional("wandb", extra="wandb")
        self._run = wandb.init(project="headwater", id=name, name=name, resume="allow", config=config)

    def write(self, step: int, weight_version: int, figures: Mapping[str, float]) -> None:
        self._run.log({"weight_version": weight_version, **figures}, step=step)

    def close(self) -> None:
        self._run.finish()


def _optional(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise SettingsError(
            f"trainer.log_{extra} is on but {extra} is not installed: pip install 'headwater[{extra}]', or turn it off"
        ) from exc

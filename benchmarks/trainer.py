"""Claim: a preference step on a whole document costs a fraction of TRL's, and never more than it.

    python -m benchmarks.trainer [--quick] [--json FILE]                  (one CPU core, 20 to 25 minutes)
    python -m benchmarks.trainer --device cuda [--json FILE]              (one GPU of 80 GB)

One document a step, random Llamas and ids, suffixes of 128 tokens: every chunk but the first with two branches, or with
the original as one of the pair, and a single chunk. The contestants, on the same ids and weights:

    trl               TRL's `DPOTrainer.training_step` as it comes: on a CPU its head scores every row
    trl_suffix_rows   the same with the head on the rows that predict suffix tokens, as it comes on CUDA
    separate, tree    the trainer's two layouts

Each runs in a process of its own (benchmarks/trainer_case.py), one after the other; if losses or gradient norms differ,
there is no result. TRL checkpoints no activations here, as the trainer does not. `--compile` compiles the layers of
`separate` and `tree`. On CUDA all compute in bfloat16, and the log-probs of both layouts are compared with float32.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.document_pairs import Cost, Work, separate_cost, tree_cost
from benchmarks.report import Report, parser
from benchmarks.trainer_case import SHAPES, Case, Contestant, Outcome
from trainer.throughput import peak_flops

LENGTHS = (512, 1024, 2048)
GOAL_LENGTH = 2048
GOALS = {False: 4.5, True: 6.5}
"""CPU: TRL's suffix rows over tree at GOAL_LENGTH, by whether the original is in the pair."""
FLOP_SHARE, MFU, NOISE = 0.8, 0.4, 2.0
"""CUDA: of the ratio that the operations give; of the device's peak; of the deviation of `separate` from float32."""
LIMIT_S = 45.0
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}

Outcomes = dict[Contestant, Outcome]


def main() -> int:
    given = _options()
    report = Report()
    lengths = given.lengths or (LENGTHS[:1] if given.quick else LENGTHS)
    for work in _works(lengths, quick=given.quick):
        outcomes = {name: _run(_case(given, name, work)) for name in _contestants(given, work)}
        _refuse_different_work(work, outcomes, given.dtype)
        _note(report, given, work, outcomes)
        _judge(report, given, work, outcomes)
    return report.finish(given.json)


def _options() -> Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--model-shape", choices=tuple(SHAPES), help="256x6 on a CPU, 1.4B on CUDA")
    options.add_argument("--lengths", type=int, nargs="+", help="of the documents, in tokens; multiples of 128")
    options.add_argument("--repetitions", type=int, help=f"timed steps of each case (5), begun within {LIMIT_S:g} s")
    options.add_argument("--contestants", nargs="+", help="some of them only; no ratios to those that are missing")
    options.add_argument("--compile", action="store_true", help="compile the layers of `separate` and `tree`")
    given = options.parse_args()
    given.model_shape = given.model_shape or ("256x6" if given.device == "cpu" else "1.4B")
    given.repetitions = given.repetitions or (2 if given.quick else 5)
    given.dtype = "float32" if given.device == "cpu" else "bfloat16"
    return given


def _works(lengths: Sequence[int], *, quick: bool) -> list[Work]:
    works = [Work(length, with_original=original) for length in lengths for original in (False, True)]
    singles = [Work(length, "middle") for length in lengths] + [Work(max(lengths), "first")]
    return works[:1] + singles[:1] if quick else works + singles


def _contestants(given: Namespace, work: Work) -> list[Contestant]:
    """What TRL costs as it comes does not depend on the pair, and is measured once a length; on CUDA it comes with
    suffix rows."""
    names: list[Contestant] = ["trl_suffix_rows", "separate", "tree"]
    if given.device == "cuda":
        names[0] = "trl"
    elif work.chunks == "every" and not work.with_original:
        names.insert(0, "trl")
    return [name for name in names if name in (given.contestants or names)]


def _case(given: Namespace, contestant: Contestant, work: Work) -> Case:
    return Case(
        contestant=contestant,
        length=work.length,
        chunks=work.chunks,
        with_original=work.with_original,
        shape=given.model_shape,
        device=given.device,
        dtype=given.dtype,
        repetitions=given.repetitions,
        limit_s=LIMIT_S,
        compile=given.compile and not contestant.startswith("trl"),
    )


def _run(case: Case) -> Outcome:
    print(f"{case.work}: {case.contestant}", file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "benchmarks.trainer_case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed: {done.stderr[-2000:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _refuse_different_work(work: Work, outcomes: Outcomes, dtype: str) -> None:
    """Losses and gradient norms of the first step, which all take from the same weights."""
    first = next(iter(outcomes.values()), None)
    for name, outcome in outcomes.items():
        assert first is not None
        near = math.isclose(outcome.losses[0], first.losses[0], abs_tol=LOSS_TOLERANCE[dtype])
        if not near or not math.isclose(outcome.grad_norms[0], first.grad_norms[0], rel_tol=GRADIENT_TOLERANCE[dtype]):
            found = {name: (outcome.losses[0], outcome.grad_norms[0]) for name, outcome in outcomes.items()}
            raise SystemExit(f"{work}: {name} does other work than the rest: losses and gradient norms {found}")


def _note(report: Report, given: Namespace, work: Work, outcomes: Outcomes) -> None:
    unit = "CPU seconds" if given.device == "cpu" else "seconds"
    for name, outcome in outcomes.items():
        flops = _cost(given, name, work).step_flops(SHAPES[given.model_shape].config())
        seconds = statistics.median(outcome.seconds)
        report.figures[f"{work}, {name}: {unit} a step"] = seconds
        report.figures[f"{work}, {name}: repetitions"] = len(outcome.seconds)
        report.figures[f"{work}, {name}: peak memory of a step, MB"] = outcome.peak / 1e6
        report.figures[f"{work}, {name}: tokens through the policy"] = outcome.num_tokens
        report.figures[f"{work}, {name}: operations, TFLOP"] = flops / 1e12
        if given.device == "cuda":
            report.figures[f"{work}, {name}: tokens a second"] = outcome.num_tokens / seconds
            report.figures[f"{work}, {name}: MFU"] = flops / seconds / (peak_flops(outcome.device) or math.nan)
            report.figures["device"] = outcome.device


def _judge(report: Report, given: Namespace, work: Work, outcomes: Outcomes) -> None:
    """Ratios, and the goals beside them."""
    peer: Contestant = "trl" if given.device == "cuda" else "trl_suffix_rows"
    seconds = {name: statistics.median(outcome.seconds) for name, outcome in outcomes.items()}
    for name in seconds.keys() - {"tree", peer} if "tree" in seconds else ():
        report.figures[f"{work}: {name} over tree"] = seconds[name] / seconds["tree"]
    if {"tree", peer} <= seconds.keys():
        _judge_ratio(report, given, work, seconds[peer] / seconds["tree"])
    if {"tree", "separate"} <= outcomes.keys() and work.chunks == "every":
        share = outcomes["tree"].peak / outcomes["separate"].peak
        report.at_most(f"{work}: peak memory of tree over separate", share, 1.0)
    if given.device == "cuda" and {"tree", "separate"} <= outcomes.keys() and work.chunks == "every":
        report.at_least(f"{work}: MFU of tree", float(report.figures[f"{work}, tree: MFU"]), MFU)
        _judge_noise(report, given, work, outcomes)


def _judge_ratio(report: Report, given: Namespace, work: Work, ratio: float) -> None:
    """What TRL takes over what `tree` takes."""
    name = f"{work}: TRL with suffix rows over tree"
    if work.chunks != "every":
        return report.at_least(name, ratio, 1.0)
    config = SHAPES[given.model_shape].config()
    by_flops = _cost(given, "separate", work).step_flops(config) / _cost(given, "tree", work).step_flops(config)
    report.figures[f"{work}: the same by operations"] = by_flops
    if given.device == "cuda":
        return report.at_least(name, ratio, FLOP_SHARE * by_flops)
    if work.length == GOAL_LENGTH:
        return report.at_least(name, ratio, GOALS[work.with_original])
    report.figures[name] = ratio
    return None


def _judge_noise(report: Report, given: Namespace, work: Work, outcomes: Outcomes) -> None:
    """How far the log-probs of both layouts are from those of `separate` in float32; they may differ by NOISE."""
    exact = _run(dataclasses.replace(_case(given, "separate", work), dtype="float32", repetitions=1)).log_probs
    far = {
        name: max(abs(value / exact[suffix] - 1) for suffix, value in outcomes[name].log_probs.items())
        for name in ("separate", "tree")
    }
    report.figures[f"{work}: deviation of separate from float32"] = far["separate"]
    report.at_most(f"{work}: deviation of tree from float32", far["tree"], NOISE * far["separate"])


def _cost(given: Namespace, contestant: Contestant, work: Work) -> Cost:
    pairs = work.pairs(SHAPES[given.model_shape].vocabulary)
    if contestant == "tree":
        return tree_cost(pairs)
    return separate_cost(pairs, whole_head=contestant == "trl" and given.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())

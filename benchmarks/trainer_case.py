"""One contestant's steps on one document, in a process of its own: started by benchmarks/trainer.py.

    python -m benchmarks.trainer_case '{"contestant": "tree", "length": 1024, ...}'      (prints one line of JSON)

A step is the reference's forward, the policy's forward and backward, and AdamW. The first steps are a warm-up. Its peak
is that of the process (CPU) or of the allocator (CUDA) beyond what models and imports take before the first step.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.document_pairs import SUFFIX_TOKENS, Chunks, Work
from benchmarks.trl_peer import TrlPeer
from shared.settings import TrainerSettings
from trainer.layouts.base import Layout, PassPlan, WindowPairs
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.layouts.trial import choose_kernel
from trainer.log_probs import SuffixLogProbs

Contestant = Literal["trl", "trl_suffix_rows", "separate", "tree"]
BETA, LEARNING_RATE = 0.1, 1e-5


@dataclass(frozen=True)
class Shape:
    """Of a random Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=8192,
            use_cache=False,
        )


SHAPES = {
    "256x6": Shape(hidden=256, intermediate=1024, layers=6, heads=4, vocabulary=4096),
    "512x8": Shape(hidden=512, intermediate=2048, layers=8, heads=8, vocabulary=8192),
    "1.4B": Shape(hidden=2048, intermediate=5632, layers=24, heads=16, vocabulary=32_000),
}


@dataclass(frozen=True)
class Case:
    contestant: Contestant
    length: int
    chunks: Chunks
    with_original: bool
    shape: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of the forwards and backwards; weights are float32."""
    repetitions: int
    limit_s: float
    """No repetition begins once the ones before took so long together."""
    compile: bool = False

    @property
    def work(self) -> Work:
        return Work(self.length, self.chunks, self.with_original)

    @property
    def max_tokens(self) -> int:
        """The budget of a pass: more than any document's tree, and the same for every contestant."""
        return 3 * self.length


@dataclass(frozen=True)
class Outcome:
    """Of the timed steps."""

    seconds: list[float]
    """CPU seconds of one thread; on CUDA wall seconds with synchronisation."""
    losses: list[float]
    grad_norms: list[float]
    num_tokens: int
    """Through the policy in one step, padding included."""
    peak: int
    """Bytes."""
    log_probs: dict[str, float]
    """Of the first step, by `start.side`; empty for TRL, which gives none."""
    device: str


class OurStep:
    """As the trainer's loop takes it."""

    def __init__(self, case: Case, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        self._case = case
        self._layout = build_layout(case)
        for model in (policy, reference):
            model.set_attn_implementation(self._layout.attention_implementation)
        self._policy, self._reference = SuffixLogProbs(policy), SuffixLogProbs(reference)
        self.log_probs: dict[str, float] = {}

    def gradients(self, window: WindowPairs) -> tuple[float, int]:
        device = torch.device(self._case.device)
        (plans,) = self._layout.plan([window], max_tokens=self._case.max_tokens)
        loss, num_tokens = torch.zeros((), device=device), 0
        for plan in plans:
            one = self._layout.lay_out(plan, device=device)
            with self._precision():
                with torch.no_grad():
                    reference = self._reference(one)
                log_probs = self._policy(one)
            better, worse = (log_probs - reference).chunk(2)
            part = -functional.logsigmoid(BETA * (better - worse)).sum() / len(window)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
            num_tokens += one.num_tokens
            self._keep(plan, log_probs.detach())
        return float(loss), num_tokens

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        if self._case.dtype == "float32":
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[None]", torch.autocast(self._case.device, torch.bfloat16))

    def _keep(self, plan: PassPlan, log_probs: Tensor) -> None:
        names = [f"{pair.start}.{side}" for side in range(2) for pair in plan.pairs]
        self.log_probs |= dict(zip(names, log_probs.tolist(), strict=True))


class TrlStep:
    """TRL's batches are single pairs on a CPU, where padding only costs, and those of `separate` on CUDA."""

    def __init__(self, case: Case, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        suffix_rows, bf16 = case.contestant == "trl_suffix_rows", case.dtype == "bfloat16"
        self._peer = TrlPeer(policy, reference, beta=BETA, suffix_rows=suffix_rows, bf16=bf16)
        self._max_tokens = 1 if case.device == "cpu" else case.max_tokens
        self.log_probs: dict[str, float] = {}

    def gradients(self, window: WindowPairs) -> tuple[float, int]:
        (plans,) = SeparateLayout().plan([window], max_tokens=self._max_tokens)
        parts = [self._peer.training_step(plan.pairs, num_step_pairs=len(window)) for plan in plans]
        return sum(loss for loss, _ in parts), sum(num_tokens for _, num_tokens in parts)


def main(case: Case) -> Outcome:
    torch.set_num_threads(1)
    policy, reference = build_model(case, seed=0), build_model(case, seed=1)
    reference.requires_grad_(False)
    step = (TrlStep if case.contestant.startswith("trl") else OurStep)(case, policy, reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)
    before = _memory(case.device, reset=True)
    for warm_up in _warm_ups(case):
        _take_step(step, policy, optimizer, warm_up)
    window = case.work.pairs(SHAPES[case.shape].vocabulary)
    seconds: list[float] = []
    losses: list[float] = []
    grad_norms: list[float] = []
    log_probs: dict[str, float] = {}
    num_tokens = 0
    while len(seconds) < case.repetitions and sum(seconds) < case.limit_s:
        began = _now(case.device)
        loss, grad_norm, num_tokens = _take_step(step, policy, optimizer, window)
        seconds.append(_now(case.device) - began)
        losses.append(loss)
        grad_norms.append(grad_norm)
        log_probs = log_probs or dict(step.log_probs)
    peak = _memory(case.device) - before
    name = torch.cuda.get_device_name() if case.device == "cuda" else "cpu"
    return Outcome(seconds, losses, grad_norms, num_tokens, peak, log_probs, name)


def build_layout(case: Case) -> Layout:
    if case.contestant == "separate":
        return SeparateLayout()
    return TreeLayout(choose_kernel(TrainerSettings(), torch.device(case.device)))


def build_model(case: Case, *, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.device(case.device):
        model = LlamaForCausalLM(SHAPES[case.shape].config())  # type: ignore[no-untyped-call]
    model.train(False)
    if case.compile:
        for layer in model.model.layers:
            layer.compile()
    return model


def _warm_ups(case: Case) -> Iterator[WindowPairs]:
    """A short document on a CPU; on CUDA, and where shapes are compiled, the document itself, twice."""
    if case.device == "cpu" and not case.compile:
        yield Work(2 * SUFFIX_TOKENS).pairs(SHAPES[case.shape].vocabulary)
        return
    for _ in range(2):
        yield case.work.pairs(SHAPES[case.shape].vocabulary)


def _take_step(
    step: OurStep | TrlStep, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, window: WindowPairs
) -> tuple[float, float, int]:
    """Loss, norm of the gradient, tokens."""
    optimizer.zero_grad()
    loss, num_tokens = step.gradients(window)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    optimizer.step()
    return loss, grad_norm, num_tokens


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str, *, reset: bool = False) -> int:
    """The peak so far in bytes; `reset`: it begins again from what is held now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    words = Path("/proc/self/status").read_text(encoding="ascii").split()
    return int(words[words.index("VmHWM:") + 1]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(main(Case(**json.loads(sys.argv[1]))))))

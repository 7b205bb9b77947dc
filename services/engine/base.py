"""The seam between services and language models.

A service holds exactly one `Engine` and knows no other way to a model. Tests fake at this seam only.
`vllm`, `transformers` and `openai` live beside this file; `build_engine` (build.py) picks by settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from shared.api import TextFlaw

TokenSequence = Sequence[int]
Prompt = str | TokenSequence
"""Text is tokenised by the engine without adding special tokens; token ids go in as they are."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt."""

    max_tokens: int
    bounds: tuple[int, ...] = ()
    """Per prompt its own bound below `max_tokens`; empty: `max_tokens` for all of them."""
    num_samples: int = 1
    """All samples of one prompt share one prefill."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """The same prompt with the same sampling under the same weights gives the same samples, whatever other
    requests share its batch."""
    pattern: str = ""
    """A regular expression that the whole text of each sample matches, unless it is cut off before; empty: any text.
    For engines that can hold a sample to one (`Engine.can_constrain`); the others raise PromptError."""

    @classmethod
    def bounded(cls, bounds: Sequence[int], **options: Any) -> "Sampling":
        """With a bound for each prompt."""
        return cls(max_tokens=max(bounds), bounds=tuple(bounds), **options)

    def bound(self, row: int) -> int:
        """The most tokens of each sample of prompt `row`."""
        return self.bounds[row] if self.bounds else self.max_tokens


@dataclass(frozen=True)
class Generation:
    """One sampled continuation."""

    token_ids: tuple[int, ...]
    """In the model's tokens; a sampled end-of-sequence token is the last one. Empty where an endpoint
    returns text only."""
    text: str
    """What they say after the prompt: without special tokens, and without a character that is cut at either end."""
    finish_reason: Literal["length", "stop"]
    weight_version: int
    """The oldest weight version that any of its tokens was sampled under."""
    flaw: TextFlaw = ""
    """Why `text` is not all that the tokens say, but for an end-of-sequence token."""


@dataclass(frozen=True)
class TokenScore:
    """What the model thought of one given token, and which it would have liked best (natural logarithms)."""

    log_prob: float
    best_token_id: int
    best_log_prob: float


@runtime_checkable
class TokenScorer(Protocol):
    """An engine that can say more than `Engine.score`: what `echo` with `logprobs` of /v1/completions needs."""

    async def score_tokens(self, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[list[TokenScore]], int]:
        """One score per token of each continuation, and the weight version that they were computed under."""
        ...


@runtime_checkable
class PatchableEngine(Protocol):
    """An engine that may take the changed elements of a version alone, in place, instead of all its weights."""

    @property
    def can_patch(self) -> bool:
        """Whether `patch_weights` works with the model as it was loaded; asked before every update."""
        ...

    async def patch_weights(self, patches: Path, *, base: int, version: int) -> None:
        """Change elements so that the weights of version `base`, which must be in service, become those of `version`.

        `patches` is a safetensors file, verified. Per changed tensor NAME it holds `NAME.indices` (int64, into the
        flattened tensor, ascending, distinct) and `NAME.values` (the new elements, in the dtype that was published);
        its metadata `shapes` is a JSON object {NAME: shape}. Names and shapes are checked before anything changes;
        NAMEs are checkpoint names. services/engine/weights.py reads it (`read_patches`).

        Requests in flight go on, as with `load_weights`. On EngineError either the weights of `base` stay in service,
        or generation is held until the `load_weights` that follows: the caller has the whole of `version` on disk and
        loads that next, or the last good one. Half-patched weights never answer.
        """
        ...


@runtime_checkable
class FallibleEngine(Protocol):
    """An engine that may fail for good, such as one whose model runs in a process of its own."""

    @property
    def failure(self) -> str:
        """Why it can never answer again; empty while it can. The service ends with it (services/lifespan.py)."""
        ...


class Engine(Protocol):
    """Asynchronous, bounded in queue and time. Raises EngineError, or OverloadedError when its queue is full."""

    @property
    def name(self) -> str:
        """What fingerprints and /readyz show: kind and model."""
        ...

    @property
    def weight_version(self) -> int:
        """The version that new requests are answered under; 0 until weights were loaded."""
        ...

    @property
    def can_score(self) -> bool:
        """Whether `score` works (an endpoint may refuse to give log-probs of given tokens)."""
        ...

    @property
    def can_constrain(self) -> bool:
        """Whether samples can be held to a `Sampling.pattern`."""
        ...

    async def start(self) -> None:
        """Load the model; returns when the engine can answer."""
        ...

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.num_samples` continuations of each prompt, in the order of the prompts.

        Row i of `prompts` is sampled with seed `sampling.seed + i`.
        """
        ...

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
        """Natural-log probabilities of each continuation's tokens after the prompt; one prefill of the prompt.

        A text continuation is tokenised on its own, without special tokens.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """The model's tokens, no special tokens added. EngineError where the engine has no tokenizer."""
        ...

    def decode(self, token_ids: TokenSequence) -> str:
        """Text without special tokens."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    def render_chat(self, prompt: str) -> str:
        """One user message in the model's chat template, up to where the assistant's answer begins."""
        ...

    async def load_weights(self, folder: Path, version: int) -> None:
        """Switch to the safetensors files in `folder` between batches: requests in flight are not lost.

        The files are checked against the model (names, shapes, dtypes) before anything changes; on EngineError the
        last good weights stay. The caller leaves `folder` as it is while its version is in service, so that an engine
        whose update broke off can load the last good one again.
        """
        ...

    async def close(self) -> None: ...

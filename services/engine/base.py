"""The seam between services and language models: the `Engine` protocol and what goes in and out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from shared.api import TextFlaw

Tokens = tuple[int, ...]
TokenSequence = Sequence[int]
Prompt = str | TokenSequence
"""Text is tokenised by the engine without special tokens; token ids are used as given."""


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    bounds: tuple[int, ...] = ()
    """`max_tokens` of each prompt; empty: the same for all."""
    num_samples: int = 1
    """The samples of one prompt share its prefill."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """The same prompt, sampling and weights give the same samples, whatever else is in the batch."""
    pattern: str = ""
    """A regular expression that a whole text must match unless it is cut short. PromptError without `can_constrain`."""
    words: tuple[str, ...] = ()
    """Where a sample spells one of these, `Generation.word_odds` has the log-probs of all of them. Without `can_grade`
    it stays empty."""
    adapter: str = ""
    """Folder of a LoRA adapter that the engine was built with; empty: `engine.lora_adapter`, if there is one."""

    @classmethod
    def bounded(cls, bounds: Sequence[int], **options: Any) -> "Sampling":
        """With one `max_tokens` per prompt: `Sampling.bounded([9, 2], seed=3)`."""
        return cls(max_tokens=max(bounds), bounds=tuple(bounds), **options)

    def bound(self, row: int) -> int:
        return self.bounds[row] if self.bounds else self.max_tokens


@dataclass(frozen=True)
class WordOdds:
    """What the model thought of the words of `Sampling.words` where it wrote one of them."""

    start: int
    """In characters of `Generation.text`, where the written word begins, after its space."""
    log_probs: tuple[float, ...]
    """Natural, of each word's first token in this place, in their order; -inf where the engine lists none. They are the
    model's own, before temperature and top_p; with a `pattern`, those of the tokens that it allows."""


@dataclass(frozen=True)
class Generation:
    token_ids: tuple[int, ...]
    """With a sampled end-of-sequence token at the end. Empty if an endpoint returns text only."""
    text: str
    """The tokens decoded after the prompt, without special tokens and without characters cut at either end."""
    finish_reason: Literal["length", "stop"]
    weight_version: int
    """The oldest weight version that any of its tokens was sampled under."""
    flaw: TextFlaw = ""
    """Why `text` does not show all tokens (a final end-of-sequence token aside)."""
    word_odds: tuple[WordOdds, ...] = ()
    """By place in the text."""


@dataclass(frozen=True)
class TokenScore:
    """Log-probabilities (natural) of one given token and of the likeliest token in its place."""

    log_prob: float
    best_token_id: int
    best_log_prob: float


@runtime_checkable
class TokenScorer(Protocol):
    async def score_tokens(self, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[list[TokenScore]], int]:
        """One score per token of each continuation, and the weight version they were computed under."""


@runtime_checkable
class PatchableEngine(Protocol):
    """An engine that can apply the changed elements of a version in place."""

    @property
    def can_patch(self) -> bool:
        """Whether `patch_weights` works with the loaded model; asked before every update."""

    async def patch_weights(self, patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
        """Turn the weights of version `base`, which must be in service, into those of `version`, as `load_weights`.

        `patches` is a safetensors file. For each changed tensor NAME (a checkpoint name) it holds `NAME.indices`
        (int64, into the flattened tensor, ascending, distinct) and `NAME.values` (in the published dtype); its metadata
        `shapes` is a JSON object {NAME: shape}.

        `last_good` restores version `base`: a folder of safetensors files, then files of patches to apply in order.
        The caller keeps them, and `patches`, until the next update has succeeded. On EngineError version `base` stays
        in service, loaded again from `last_good` if need be, and the caller may load the whole of `version`.
        """


@runtime_checkable
class FallibleEngine(Protocol):
    """An engine that can fail for good, such as one with the model in another process."""

    @property
    def failure(self) -> str:
        """Why it can never answer again; empty while it can. The service then ends (life.py)."""


class Engine(Protocol):
    """Asynchronous, bounded in queue and time. Raises EngineError, or OverloadedError when its queue is full."""

    @property
    def name(self) -> str:
        """Kind and model, such as "vllm:meta-llama/Llama-3.2-1B"; shown in fingerprints and /readyz."""

    @property
    def weight_version(self) -> int:
        """The version that new requests are answered under; 0 until one is loaded."""

    @property
    def can_score(self) -> bool:
        """Whether `score` works: some endpoints give no log-probs of given tokens."""

    @property
    def can_constrain(self) -> bool:
        """Whether `Sampling.pattern` works."""

    @property
    def can_grade(self) -> bool:
        """Whether `Sampling.words` works."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether `encode`, `encode_content` and `decode` work."""

    async def start(self) -> None:
        """Load the model. Returns once the engine can answer."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.num_samples` continuations per prompt, in order; prompt i has seed `sampling.seed + i`."""

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        """Log-probabilities (natural) of each continuation's tokens after the prompt, which is prefilled once.

        Text continuations are tokenised separately from the prompt, without special tokens.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that we wrote: control tokens in it are encoded as such. EngineError without
        `has_tokenizer`."""

    def encode_content(self, text: str) -> list[int]:
        """Token ids of a text that somebody else wrote, as it continues other text: never a control token nor any other
        added token, whatever the text spells."""

    def decode(self, token_ids: TokenSequence) -> str:
        """Text without special tokens."""

    @property
    def has_chat_template(self) -> bool: ...

    def render_chat(self, prompt: str) -> str:
        """The system prompt and one user message in the model's chat template, ready for the assistant's answer."""

    async def load_weights(self, folder: Path, version: int) -> None:
        """Switch to the safetensors files in `folder` between batches, without losing requests in flight.

        Names, shapes and dtypes are checked before anything changes. On EngineError the last good weights stay in
        service. The caller keeps `folder` until the next update has succeeded: the engine may have to load it again.
        """

    async def close(self) -> None: ...

"""A fake at the Engine seam: scripted answers, and a record of what was asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.engine.base import Generation, Prompt, Sampling, TokenSequence
from shared.errors import EngineError


@dataclass
class FakeEngine:
    """`answer(prompt, sample_index)` gives the text of one sample (an exception in its place is raised);
    `log_probs(prompt, continuation)` the scores of a continuation's tokens. Tokens are the bytes of the text."""

    answer: Callable[[str, int], str | Exception] = lambda prompt, index: f"answer {index}"
    log_probs: Callable[[str, str], list[float]] | None = None
    can_constrain: bool = False
    can_grade: bool = False
    has_tokenizer: bool = True
    chat: bool = False
    name: str = "fake:model"
    weight_version: int = 0
    num_generate_calls: int = 0
    num_score_calls: int = 0
    prompts: list[str] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    started: bool = False
    closed: bool = False
    failing_loads: int = 0

    @property
    def can_score(self) -> bool:
        return self.log_probs is not None

    async def start(self) -> None:
        self.started = True

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.num_generate_calls += 1
        self.samplings.append(sampling)
        return [[self._generation(prompt, n) for n in range(sampling.num_samples)] for prompt in self._noted(prompts)]

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        self.num_score_calls += 1
        (text,) = self._noted([prompt])
        if self.log_probs is None:
            raise EngineError("this engine can't score")
        return [self.log_probs(text, self._text(continuation)) for continuation in continuations]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_content(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, token_ids: TokenSequence) -> str:
        return bytes(token_ids).decode(errors="ignore")

    @property
    def has_chat_template(self) -> bool:
        return self.chat

    def render_chat(self, prompt: str) -> str:
        return f"<user>{prompt}</user>"

    async def load_weights(self, folder: Path, version: int) -> None:
        if self.failing_loads:
            self.failing_loads -= 1
            raise EngineError(f"{folder} does not fit the model")
        self.weight_version = version

    async def close(self) -> None:
        self.closed = True

    def _generation(self, prompt: str, index: int) -> Generation:
        answer = self.answer(prompt, index)
        if isinstance(answer, Exception):
            raise answer
        return Generation(tuple(answer.encode()), answer, "stop", self.weight_version)

    def _noted(self, prompts: Sequence[Prompt]) -> list[str]:
        texts = [self._text(prompt) for prompt in prompts]
        self.prompts.extend(texts)
        return texts

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.decode(prompt)

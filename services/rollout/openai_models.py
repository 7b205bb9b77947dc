"""Requests and answers of OpenAI's completions protocol. Used by completions.py."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from shared.records import Record, TokenIds

MODEL_ID = "policy"
MAX_PROMPTS = 1024
MAX_SAMPLES = 128
MAX_CHOICES = 1024
"""Prompts times samples in one request."""
MAX_PROMPT_CHARACTERS = 4_000_000
MAX_PROMPT_TOKENS = 1_000_000
_FORMS = "a text, texts, a list of token ids, or several lists of token ids"


def _in_one_sentence(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Pydantic would list an error for every form."""
    try:
        return read(value)
    except ValidationError:
        raise ValueError(f"prompt must be {_FORMS}") from None


Prompts = Annotated[str | list[str] | TokenIds | list[TokenIds], WrapValidator(_in_one_sentence)]


class CompletionRequest(Record):
    """The fields that OpenAI's clients send. Unsupported ones are accepted at their neutral value only."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The Moon moves around the", "seed": 1}]})
    model: str = MODEL_ID
    prompt: Prompts
    max_tokens: int | None = Field(default=16, ge=0, le=8192)
    """0 samples nothing; `echo` and `logprobs` then score the prompt."""
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    best_of: int | None = None
    temperature: float | None = Field(default=1.0, ge=0.0, le=10.0)
    top_p: float | None = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=1)
    """0: of the tokens alone; 1: also the most probable token at each place."""
    stream: bool | None = False
    stream_options: Any = None
    suffix: str | None = None
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> "CompletionRequest":
        neutral = ("stream", "suffix", "frequency_penalty", "presence_penalty", "logit_bias")
        asked = [name for name in neutral if getattr(self, name)]
        if self.best_of not in (None, self.n):
            asked.append("best_of")
        if asked:
            raise ValueError(f"not supported here, leave out: {', '.join(asked)}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 without echo asks for nothing")
        return self

    @model_validator(mode="after")
    def _is_within_limits(self) -> "CompletionRequest":
        prompts = self.prompts
        if not prompts:
            raise ValueError(f"prompt is empty: give {_FORMS}")
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts, at most {MAX_PROMPTS} in one request")
        if (num_choices := len(prompts) * self.n) > MAX_CHOICES:
            counted = f"{len(prompts)} prompts times n = {self.n} are {num_choices} choices"
            raise ValueError(f"{counted}, at most {MAX_CHOICES} in one request")
        for index, prompt in enumerate(prompts):
            _check_size(prompt, name="prompt" if isinstance(self.prompt, str | tuple) else f"prompt {index}")
        return self

    @property
    def prompts(self) -> list[str | TokenIds]:
        """A list, whichever form the prompt has."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt, tuple):
            return [self.prompt] if self.prompt else []
        return list(self.prompt)

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [stop for stop in stops if stop]


def _check_size(prompt: str | TokenIds, *, name: str) -> None:
    if not prompt:
        raise ValueError(f"{name} is empty: the model needs at least one token to continue")
    unit, allowed = ("characters", MAX_PROMPT_CHARACTERS) if isinstance(prompt, str) else ("tokens", MAX_PROMPT_TOKENS)
    if len(prompt) > allowed:
        raise ValueError(f"{name} has {len(prompt)} {unit}, at most {allowed}")


TopLogprobs = dict[str, float] | None


class ChoiceLogprobs(Record):
    """One entry for each token of `text`; the first token of an echoed prompt has no log-prob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[TopLogprobs] | None
    text_offset: list[int]


class Choice(Record):
    index: int
    """Prompt index * n + sample."""
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None = None


class Usage(Record):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(Record):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str = MODEL_ID
    choices: list[Choice]
    usage: Usage
    weight_version: int
    """The oldest one among the choices."""


class ModelCard(Record):
    id: str = MODEL_ID
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headwater"
    metadata: dict[str, Any]
    """`weight_version` and `engine`."""


class ModelList(Record):
    object: Literal["list"] = "list"
    data: list[ModelCard]

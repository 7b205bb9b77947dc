"""Settings of the services and of the engines in them. Part of the tree in shared/settings.py."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.api import MAX_TEMPERATURE
from shared.secret_urls import url_of


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(Section):
    kind: Literal["transformers", "openai", "vllm"] = "transformers"
    """What runs the model: this process with Transformers or vLLM, or an OpenAI-compatible endpoint."""
    model: str = ""
    """Folder or Hugging Face name, or the model's name at the endpoint; empty for rollout: policy.model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(default=1, ge=0)
    """CPU threads; 0: torch's default. 1, since several services share a machine."""
    max_batch_tokens: int = Field(default=16_384, ge=1)
    """`transformers`: prompt and new tokens of one batch, padding included."""
    batch_wait_s: float = Field(default=0.005, ge=0)
    """`transformers`: how long the first request of a batch waits for others."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Further requests are answered 503 with Retry-After."""
    endpoint: Annotated[str, url_of("http", "https")] = ""
    """`openai`: base URL, such as http://host:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """`openai`: environment variable with the key of the endpoint; unset if it needs none."""
    timeout_s: float = Field(default=600.0, gt=0)
    max_model_tokens: int = Field(default=0, ge=0)
    """`vllm`: longest prompt plus answer; 0: the model's own limit. Lower it to serve more requests at once."""
    kv_cache_gib: float = Field(default=0.0, ge=0)
    """`vllm`: memory for keys and values; 0: what gpu_memory_utilization leaves, or 1 GiB on a CPU."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """`vllm` on a GPU: share of its memory for weights, activations and cache. Lower it where services share a GPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """`vllm`: devices that each copy of the model is split over."""
    data_parallel_size: int = Field(default=1, ge=1)
    """`vllm`: copies of the model."""
    lora_adapter: str = ""
    """`vllm`: folder of a PEFT LoRA adapter for every request of a judge or rewriter."""
    max_num_seqs: int = Field(default=0, ge=0)
    """`vllm`: requests in one step; 0: what vLLM's own server takes on this device."""
    max_num_batched_tokens: int = Field(default=0, ge=0)
    """`vllm`: tokens of one step; 0: what vLLM's own server takes on this device."""
    ngram_tokens: int = Field(default=0, ge=0)
    """`vllm`: tokens guessed at once by looking up what was last written in the prompt (n-gram speculative decoding).
    It speeds up a rewriter, whose answers mostly copy, and such an engine gives no log-probs; 0: off."""
    engine_arguments: dict[str, Any] = Field(default_factory=dict)
    """`vllm`: any other of its engine arguments, such as { quantization = "fp8" }."""
    system_prompt: str = ""
    """Chat models: the system message; empty: none."""
    chat_template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Chat models: what their template takes, such as { enable_thinking = false }."""
    thinking_end: str = "</think>"
    """What ends the thoughts of a reasoning model: an answer is what comes after the last one. Empty: no thoughts."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """`openai`: further fields of every request, such as { reasoning_effort = "low" }."""
    tokenizer: str = ""
    """`openai`: folder or name of the endpoint's tokenizer. With it, prompts are sent as token ids, so that no text can
    become a control token; without it, such text is defused."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "openai" and not self.endpoint:
            raise ValueError("engine.kind = 'openai' needs engine.endpoint, such as http://127.0.0.1:8000/v1")
        if self.lora_adapter and self.kind != "vllm":
            raise ValueError(f"engine.lora_adapter needs engine.kind = 'vllm', not '{self.kind}'")
        return self


class ServiceSettings(Section):
    host: str = "127.0.0.1"
    """Address to bind. Any other than loopback needs HEADWATER_TOKEN."""
    port: int = Field(ge=0, le=65535)
    url: Annotated[str, url_of("http", "https")] = ""
    """Where the collector reaches a service that `headwater run` doesn't start; empty: it does, at http://host:port.
    Several replicas: their addresses separated by commas, or that of a load balancer."""
    max_request_bytes: int = Field(default=64_000_000, ge=1)
    engine: EngineSettings = EngineSettings()

    @property
    def base_urls(self) -> tuple[str, ...]:
        """One a replica."""
        given = tuple(word.strip() for word in self.url.split(",") if word.strip())
        return given or (f"http://{self.host}:{self.port}",)


class RolloutSettings(ServiceSettings):
    port: int = Field(default=8001, ge=0, le=65535)
    temperature: float = Field(default=1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0, le=1)
    poll_interval_s: float = Field(default=0.2, gt=0)
    replica: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,100}$")] = ""
    """Name of this replica, unique in the run; empty: HOSTNAME-PORT."""
    weights_folder: str = ""
    """Where this replica copies the newest weights to; empty: `replicas/NAME` in the run folder."""
    heartbeat_s: float = Field(default=15.0, gt=0)
    """A replica that is silent for this long counts as dead."""


class RewriterSettings(ServiceSettings):
    port: int = Field(default=8002, ge=0, le=65535)
    prompt: Path | None = None
    """Prompt file with {prefix}, {suffix} and optionally {bridge}; None: the one in services/rewriter/prompts."""
    chat: bool | None = None
    """Wrap the prompt in the model's chat template; None: if the tokenizer has one."""
    bridge_words: int = Field(default=5, ge=0)
    """Words at the end of the prefix that the answer must repeat first; at most 8 characters a word."""
    max_prefix_characters: int = Field(default=8_000, ge=0)
    """Of a longer prefix the prompt shows the end. The default is about 2,000 tokens, the paper's context."""
    temperature: float = Field(default=0.0, ge=0)
    """0, since the best rewrite of most chunks is an exact copy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_answer_tokens: int = Field(default=0, ge=0)
    """Longest answer in the rewriter's tokens; 0: twice the suffix plus 16, since its tokenizer may need more."""
    preamble_phrases: tuple[str, ...] = ("Here is", "Here's", "Sure", "Certainly", "Of course", "Rewritten")
    """An answer that begins with one of these is about the rewrite and no candidate, unless the suffix begins so."""
    refusal_phrases: tuple[str, ...] = ("I can't", "I cannot", "I'm sorry", "As an AI")
    """An answer that begins with one of these is a refusal and no candidate, unless the suffix begins so too."""

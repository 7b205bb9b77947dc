"""The one `Settings` tree. A TOML file, overridden by the environment, overridden by the command line.

`HEADWATER_TRAINER__STEPS=10` and `--trainer.steps 10` mean the same key. Unknown keys are errors in all three
places. Secrets come from the environment only (`Secrets`) and are never written to the run folder.
Defaults are the paper's (arXiv 2601.21343, section on settings) unless a reason stands beside them.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared import limits
from shared.api import MAX_ROLLOUTS, MAX_SUFFIX_TOKENS, MAX_TEMPERATURE, MAX_WINDOW_TOKENS
from shared.records import CandidateKind
from shared.secret_urls import url_of

Objective = Literal["dpo", "rf_nll", "sft_rewrite", "sft_rollout", "dpo_rewrite_over_rollout", "next_token"]

JUDGED_OBJECTIVES: frozenset[Objective] = frozenset({"dpo", "rf_nll"})
"""Objectives that choose by reward; the collector calls the judge only for these."""

REQUIRED_KINDS: dict[Objective, frozenset[CandidateKind]] = {
    "dpo": frozenset(),
    "rf_nll": frozenset(),
    "sft_rewrite": frozenset({"rewrite"}),
    "sft_rollout": frozenset({"rollout"}),
    "dpo_rewrite_over_rollout": frozenset({"rewrite", "rollout"}),
    "next_token": frozenset({"original"}),
}


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    """Names the run folder, the Redis keys and the rows in the database."""
    directory: Path = Path("runs")
    """The run folder is `directory/name`."""
    seed: int = Field(default=0, ge=0)

    @property
    def folder(self) -> Path:
        return self.directory / self.name


class PolicySettings(Section):
    model: str = ""
    """Hugging Face folder or name of the policy to start from."""
    tokenizer: str = ""
    """Defaults to `model`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained weights. float32: updates at 5e-6 vanish in bfloat16 rounding."""

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.model


class DocumentsSettings(Section):
    format: Literal["jsonl", "parquet", "text", "huggingface"] = "jsonl"
    path: Annotated[str, url_of()] = ""
    """File, folder or glob; for `huggingface` the dataset's name."""
    subset: str = ""
    """`huggingface` only: the dataset's configuration name."""
    split: str = "train"
    """`huggingface` only."""
    text_field: str = "text"
    token_ids_field: str = ""
    """Take ready token ids of the policy's tokenizer from this field instead of text."""
    id_field: str = "id"
    """The document's own name; where the field is absent its place (`file:line`) is used."""
    shuffle_buffer: int = Field(default=1024, ge=1)
    """Documents are shuffled within blocks of this many: bounded memory, exact resume. 1 keeps the order."""
    shuffle_bytes: int = Field(default=128_000_000, ge=0)
    """The blocks of all parts together hold no more than this: each ends early at its share. 0: no bound. The default
    leaves blocks of 1,024 web documents whole for up to 16 parts."""
    num_parts: int = Field(default=1, ge=1, le=4096)
    """The source is dealt into this many parts; each collector leases one or more of them."""
    max_epochs: int = Field(default=0, ge=0)
    """Stop after this many passes; 0 goes on until the trainer has its steps."""
    max_document_bytes: int = Field(default=16_000_000, ge=1)
    """A longer line or file is refused: it would be one document of millions of tokens."""


class ChunksSettings(Section):
    context_tokens: int = Field(default=2048, ge=2, le=MAX_WINDOW_TOKENS)
    """Length of a document window, and the longest prefix plus suffix."""
    suffix_tokens: int = Field(default=128, ge=1, le=MAX_SUFFIX_TOKENS)
    min_prefix_tokens: int = Field(default=128, ge=1)
    """A chunk with a shorter prefix is context only. One chunk: the paper's first prefix."""
    min_suffix_tokens: int = Field(default=32, ge=1)
    """A shorter tail is context only: a quarter of a suffix, below that quality can't be told apart."""
    window_overlap_tokens: int = Field(default=0, ge=0)
    """Raw tokens of the previous window repeated as prefix of the next."""
    chunks_per_window: int = Field(default=0, ge=0)
    """Train only this many chunks of a window, drawn at random; 0 takes all."""
    end_of_text: bool = True
    """The tokenizer's end-of-sequence token is the last one of each document: rollouts may end, so the policy must see
    where documents do. False: where documents are pieces of longer ones."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_prefix_tokens + self.min_suffix_tokens > self.context_tokens:
            raise ValueError(
                f"min_prefix_tokens + min_suffix_tokens = {self.min_prefix_tokens + self.min_suffix_tokens} "
                f"exceeds context_tokens = {self.context_tokens}: no chunk would ever fit"
            )
        if self.window_overlap_tokens and self.window_overlap_tokens + self.min_suffix_tokens + 4 > self.context_tokens:
            raise ValueError(
                f"window_overlap_tokens + min_suffix_tokens + 4 (a BOS, and 3 where a border would cut a character) = "
                f"{self.window_overlap_tokens + self.min_suffix_tokens + 4} exceeds context_tokens = "
                f"{self.context_tokens}: windows after the first would have no chunk"
            )
        if self.min_suffix_tokens > self.suffix_tokens:
            raise ValueError("min_suffix_tokens must not exceed suffix_tokens")
        return self


class RedisSettings(Section):
    url: Annotated[str, url_of("redis", "rediss", "unix")] = ""
    """Empty: `headwater run` starts an embedded one."""
    timeout_s: float = Field(default=10.0, gt=0)


class DatabaseSettings(Section):
    url: Annotated[str, url_of()] = ""
    """SQLAlchemy URL; empty: SQLite in the run folder."""


class WeightsSettings(Section):
    store: Annotated[str, url_of()] = ""
    """Folder or fsspec URL; empty: `weights/` in the run folder."""
    push_every: int = Field(default=1, ge=1)
    """Steps between pushes of fresh weights to the rollout service."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """What the trainer's weights are sent as; empty: rollout.engine.dtype, since replicas would round them anyway."""
    full_every: int = Field(default=10, ge=1)
    """bfloat16: every n-th version is full, those between hold only what changed. Below trainer.max_policy_lag, so
    that a replica which lost a version is whole again before its rollouts are stale; 1: all versions are full."""
    keep_versions: int = Field(default=3, ge=2)
    """Older versions are deleted; 3 leaves a slow replica time to finish its fetch."""


class EngineSettings(Section):
    kind: Literal["transformers", "openai", "vllm"] = "transformers"
    model: str = ""
    """Hugging Face folder or name, or the model's name at the endpoint. Rollout: defaults to policy.model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(default=1, ge=0)
    """CPU threads of this engine's process; 0 takes torch's default. 1: several services share one machine."""
    max_batch_tokens: int = Field(default=16_384, ge=1)
    """`transformers`: prompt plus new tokens of one batch, padding included."""
    batch_wait_s: float = Field(default=0.005, ge=0)
    """`transformers`: how long a batch waits for company once a request is there."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """More are answered 503 with Retry-After."""
    endpoint: Annotated[str, url_of("http", "https")] = ""
    """`openai`: base URL such as http://host:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """`openai`: the environment variable that holds the endpoint's key; may be unset for open endpoints."""
    timeout_s: float = Field(default=600.0, gt=0)
    max_model_tokens: int = Field(default=0, ge=0)
    """`vllm`: longest prompt plus answer; 0: the model's own. Shorter leaves more of the cache to each request."""
    kv_cache_gib: float = Field(default=0.0, ge=0)
    """`vllm`: memory of keys and values; 0: what gpu_memory_utilization leaves, on a CPU 1 GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """`vllm` on a GPU: share of its memory for weights, activations and cache. Lower where services share a GPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """`vllm`: devices that one copy of the model is split over."""
    data_parallel_size: int = Field(default=1, ge=1)
    """`vllm`: copies of the model behind this one service."""
    lora_adapter: str = ""
    """`vllm`: folder of a LoRA adapter in PEFT's form, applied to every request; for judges and rewriters."""

    @model_validator(mode="after")
    def _openai_has_an_endpoint(self) -> Self:
        if self.kind == "openai" and not self.endpoint:
            raise ValueError("engine.kind = 'openai' needs engine.endpoint, such as http://127.0.0.1:8000/v1")
        return self

    @model_validator(mode="after")
    def _only_vllm_takes_adapters(self) -> Self:
        if self.lora_adapter and self.kind != "vllm":
            raise ValueError(f"engine.lora_adapter needs engine.kind = 'vllm', not '{self.kind}'")
        return self


class ServiceSettings(Section):
    host: str = "127.0.0.1"
    """Where the service binds. Another than loopback needs a token set by hand."""
    port: int = Field(ge=0, le=65535)
    url: Annotated[str, url_of("http", "https")] = ""
    """Where the collector reaches it; empty: http://host:port. With a URL set, `headwater run` starts none. Several
    replicas: their addresses separated by commas, asked in turn, or one address with a load balancer behind it."""
    max_request_bytes: int = Field(default=64_000_000, ge=1)
    engine: EngineSettings = EngineSettings()

    @property
    def base_urls(self) -> tuple[str, ...]:
        """One for each replica."""
        given = tuple(word.strip() for word in self.url.split(",") if word.strip())
        return given or (f"http://{self.host}:{self.port}",)


class RolloutSettings(ServiceSettings):
    port: int = Field(default=8001, ge=0, le=65535)
    temperature: float = Field(default=1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0, le=1)
    poll_interval_s: float = Field(default=0.2, gt=0)
    """How often a replica looks for an announced weight version."""
    replica: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,100}$")] = ""
    """This replica's name among those of a run; empty: HOSTNAME-PORT."""
    weights_folder: str = ""
    """Where this replica keeps its own copy of the newest weights; empty: `replicas/NAME` in the run folder."""
    heartbeat_s: float = Field(default=15.0, gt=0)
    """A replica that is silent for this long counts as dead: nobody waits for it."""


class RewriterSettings(ServiceSettings):
    port: int = Field(default=8002, ge=0, le=65535)
    prompt: Path | None = None
    """Prompt file with {prefix}, {suffix} and optionally {bridge}; None: services/rewriter/prompts."""
    chat: bool | None = None
    """Wrap the prompt in the model's chat template; None: when the tokenizer has one."""
    bridge_words: int = Field(default=5, ge=0)
    """The last words of the prefix, at most 8 characters for each, given before the suffix and expected to begin the
    answer."""
    max_prefix_characters: int = Field(default=8_000, ge=0)
    """The prompt shows the end of longer prefixes; about 2,000 tokens, the paper's context."""
    temperature: float = Field(default=0.0, ge=0)
    """Greedy: an exact copy is the wanted answer for most chunks."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_answer_tokens: int = Field(default=0, ge=0)
    """Bound of an answer in the teacher's tokens; 0: twice the suffix plus 16, room for another tokenizer."""
    refusal_phrases: tuple[str, ...] = ("I can't", "I cannot", "I'm sorry", "As an AI")
    """An answer that begins with one of these, where the suffix does not, is a refusal: no candidate."""


class CriterionSettings(Section):
    weight: float = Field(default=1.0, gt=0)
    """Share in the combined reward (weights are normalised)."""
    prompt: Path | None = None
    """Prompt file; None: services/judge/prompts/NAME.txt, or NAME_labels.txt for `verdict = "labels"`."""
    verdict: Literal["answer", "structured", "labels"] = "answer"
    """`answer`: sample a text and read its last `Verdict: ...`. `structured`: the same, but the engine holds the text
    to a form that ends in a verdict; needs `vllm` or an endpoint with vLLM's structured outputs. `labels`: compare
    the log-probs of the verdict words right after the prompt; one prefill, nothing sampled; needs an engine that can
    score."""
    samples: int = Field(default=5, ge=1)
    """Verdicts per question, averaged (not with `labels`, which do not vary)."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=0.6, gt=0, le=1)
    max_answer_tokens: int = Field(default=512, ge=1)
    """With `structured`: four characters count as a token."""
    function: str = ""
    """`python` only: `module:name` of a function (prefix, candidates, reference) -> scores in [0, 1]."""
    scale: float = Field(default=1.0, gt=0)
    """`likelihood` only: the score is sigmoid((log-prob per token - group mean) / scale)."""


CriterionName = Literal["quality", "safety", "factuality", "likelihood", "python"]


class JudgeSettings(ServiceSettings):
    port: int = Field(default=8003, ge=0, le=65535)
    criteria: dict[CriterionName, CriterionSettings] = {"quality": CriterionSettings()}
    chat: bool | None = None
    """Wrap prompts in the model's chat template; None: when the tokenizer has one."""
    max_prefix_characters: int = Field(default=8_000, ge=0)
    max_retries: int = Field(default=3, ge=0)
    """An unreadable verdict is asked for again with a new seed this often; then the chunk is dropped."""

    @model_validator(mode="after")
    def _criteria_are_complete(self) -> Self:
        if not self.criteria:
            raise ValueError("judge.criteria is empty: name at least one criterion")
        python = self.criteria.get("python")
        if python and ":" not in python.function:
            raise ValueError("judge.criteria.python.function must be 'module:name'")
        return self


class ScheduleStage(Section):
    """From weight version `from_version` on, which candidates a chunk gets."""

    from_version: int = Field(default=0, ge=0)
    kinds: tuple[CandidateKind, ...] = ("original", "rewrite", "rollout")
    num_rollouts: int = Field(default=16, ge=0, le=MAX_ROLLOUTS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.kinds:
            raise ValueError("a schedule stage needs at least one candidate kind")
        if ("rollout" in self.kinds) != (self.num_rollouts > 0):
            raise ValueError(f"kinds {list(self.kinds)} and num_rollouts = {self.num_rollouts} contradict each other")
        return self


class CollectorSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8004, ge=0, le=65535)
    """Health and metrics only."""
    schedule: tuple[ScheduleStage, ...] = (ScheduleStage(),)
    max_windows_in_flight: int = Field(default=8, ge=1)
    """Windows being generated and judged at once."""
    max_backlog: int = Field(default=16, ge=1)
    """A window is started only while (in flight + unread on the stream) is below this."""
    max_parts: int = Field(default=4096, ge=1)
    """Parts of the source that one collector leases at most."""
    lease_s: float = Field(default=15.0, gt=0)
    """A collector that is silent for this long loses its parts to another."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_backoff_s: float = Field(default=10.0, gt=0)
    """Retries wait 0.25 s, doubled up to this, with jitter."""
    max_attempts: int = Field(default=0, ge=0)
    """Attempts of one request before its chunks are dropped; 0 retries for as long as the service is away."""
    record_share: float = Field(default=0.1, ge=0, le=1)
    """Share of windows whose chunks and candidates are kept in the database for people to read."""
    stay_when_finished: bool = False
    """After the trainer's last step: stay, idle, instead of ending. For Kubernetes, where a Deployment that ends is
    started again and again."""

    @model_validator(mode="after")
    def _schedule_is_ordered(self) -> Self:
        versions = [stage.from_version for stage in self.schedule]
        if not versions or versions[0] != 0 or versions != sorted(set(versions)):
            raise ValueError(f"schedule must begin at from_version 0 and ascend, got {versions}")
        return self

    def stage_at(self, version: int) -> ScheduleStage:
        """The stage in force at weight version `version`."""
        return [stage for stage in self.schedule if stage.from_version <= version][-1]


class TrainerSettings(Section):
    objective: Objective = "dpo"
    steps: int = Field(default=2000, ge=1)
    pairs_per_step: int = Field(default=256, ge=1)
    """Preference pairs (for NLL objectives: chosen suffixes) in one optimizer step, over all ranks."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's inverse temperature; the paper does not state it, 0.1 is DPO's own default (arXiv 2305.18290)."""
    learning_rate: float = Field(default=5e-6, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Floor of the cosine, as a share of learning_rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Off: decay pulls towards zero, not towards the reference."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_batch_tokens: int = Field(default=8_192, ge=1)
    """Tokens of one forward pass, padding included; a step accumulates over as many as it needs."""
    refresh_reference_every: int = Field(default=0, ge=0)
    """Copy the policy into the reference every n steps; 0 keeps the reference frozen."""
    max_policy_lag: int = Field(default=16, ge=0)
    """A window whose oldest rollout is more versions behind is dropped when read, and counted."""
    replica_wait_s: float = Field(default=0.0, ge=0)
    """After a push, wait at most this long for live rollout replicas that are further behind. 0: for none, since a
    late one costs its own rollouts only, and waiting makes the run as slow as its slowest replica."""
    min_reward_gap: float = Field(default=0.0, ge=0)
    """Pairs whose rewards differ by no more than this are no preference."""
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_bad_steps: int = Field(default=5, ge=1)
    """Steps in a row with a non-finite loss before the run stops."""
    host: str = "127.0.0.1"
    """Where `metrics_port` binds. Another than loopback needs a token set by hand."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Serves /metrics and /healthz; 0: neither, since without a scraper nobody would read them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(default=1, ge=0)
    """CPU threads; 0 takes torch's default."""
    activation_checkpointing: bool = False
    stream_timeout_s: float = Field(default=0.0, ge=0)
    """Give up when no document arrives for this long; 0 waits for as long as the run is alive."""
    log_tensorboard: bool = True
    log_wandb: bool = False


class Settings(Section):
    """The whole configuration of a run."""

    run: RunSettings = RunSettings()
    policy: PolicySettings = PolicySettings()
    documents: DocumentsSettings = DocumentsSettings()
    chunks: ChunksSettings = ChunksSettings()
    redis: RedisSettings = RedisSettings()
    database: DatabaseSettings = DatabaseSettings()
    weights: WeightsSettings = WeightsSettings()
    rollout: RolloutSettings = RolloutSettings()
    rewriter: RewriterSettings = RewriterSettings()
    judge: JudgeSettings = JudgeSettings()
    collector: CollectorSettings = CollectorSettings()
    trainer: TrainerSettings = TrainerSettings()

    @model_validator(mode="after")
    def _objective_gets_its_candidates(self) -> Self:
        needed = REQUIRED_KINDS[self.trainer.objective]
        for stage in self.collector.schedule:
            missing = needed - set(stage.kinds)
            if missing:
                raise ValueError(
                    f"trainer.objective = '{self.trainer.objective}' needs candidates of kind {sorted(missing)}, "
                    f"but collector.schedule from version {stage.from_version} makes only {list(stage.kinds)}"
                )
            if self.needs_judge and len(stage.kinds) + max(0, stage.num_rollouts - 1) < 2:
                raise ValueError(
                    f"trainer.objective = '{self.trainer.objective}' needs at least two candidates a chunk, "
                    f"but collector.schedule from version {stage.from_version} makes one"
                )
        return self

    @model_validator(mode="after")
    def _a_window_fits_every_limit(self) -> Self:
        if found := list(limits.problems(self)):
            raise ValueError("; ".join(found))
        return self

    @property
    def needs_judge(self) -> bool:
        return self.trainer.objective in JUDGED_OBJECTIVES

    @property
    def kinds(self) -> frozenset[CandidateKind]:
        """All candidate kinds that any stage of the schedule makes."""
        return frozenset(kind for stage in self.collector.schedule for kind in stage.kinds)

    @property
    def database_url(self) -> str:
        return self.database.url or f"sqlite:///{self.run.folder / 'headwater.db'}"

    @property
    def weights_dtype(self) -> Literal["float32", "bfloat16"]:
        return self.weights.dtype or self.rollout.engine.dtype

    @property
    def weight_store_url(self) -> str:
        return self.weights.store or str(self.run.folder / "weights")


class Secrets(Section):
    """What comes from the environment only."""

    token: str = ""
    """HEADWATER_TOKEN: bearer token of every route but health."""

"""All settings of a run, as one tree.

A TOML file is overridden by the environment, which is overridden by the command line: `[trainer] steps = 10`,
`HEADWATER_TRAINER__STEPS=10` and `--trainer.steps 10` set the same key (shared/configuration.py). Unknown keys are
errors everywhere. Secrets come from the environment only and are never written down.

The text below a setting is its documentation. Defaults are the paper's (arXiv 2601.21343), or the reason is given.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared import limits
from shared.api import MAX_REWRITES, MAX_ROLLOUTS, MAX_SUFFIX_TOKENS, MAX_WINDOW_TOKENS
from shared.engine_settings import RewriterSettings, RolloutSettings, Section
from shared.judge_settings import JudgeSettings
from shared.objectives import OBJECTIVES, ObjectiveName
from shared.records import CandidateKind
from shared.secret_urls import url_of

_DPO_OPTIONS = ("dpo_loss", "label_smoothing", "length_normalised", "nll_weight")


class RunSettings(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    """Names the run folder `directory/name`, the Redis keys and the rows in the database."""
    directory: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    """Every random choice of the run is derived from it (shared/seeds.py)."""

    @property
    def folder(self) -> Path:
        return self.directory / self.name


class PolicySettings(Section):
    model: str = ""
    """Folder or Hugging Face name of the model to start from."""
    tokenizer: str = ""
    """Empty: that of `model`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights. float32, since updates at a learning rate of 5e-6 vanish in bfloat16 rounding."""

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.model


class DocumentsSettings(Section):
    format: Literal["jsonl", "parquet", "text", "huggingface"] = "jsonl"
    path: Annotated[str, url_of()] = ""
    """File, folder or glob; for `huggingface` the name of the dataset."""
    subset: str = ""
    """`huggingface`: the configuration of the dataset."""
    split: str = "train"
    text_field: str = "text"
    token_ids_field: str = ""
    """The field that holds token ids of the policy's tokenizer; if set, it is used instead of the text."""
    id_field: str = "id"
    """The field that names a document; documents without it are named by `file:line`."""
    shuffle_buffer: int = Field(default=1024, ge=1)
    """Documents are shuffled in blocks of this size: bounded memory, exact resume. 1 keeps their order."""
    shuffle_bytes: int = Field(default=128_000_000, ge=0)
    """Bound on the blocks of all parts together; 0: none. Enough for blocks of 1,024 web documents in 16 parts."""
    num_parts: int = Field(default=1, ge=1, le=4096)
    """Parts of the source, for collectors to share."""
    max_epochs: int = Field(default=0, ge=0)
    """Passes over the documents; 0: as many as the trainer's steps need."""
    max_document_bytes: int = Field(default=16_000_000, ge=1)


class ChunksSettings(Section):
    context_tokens: int = Field(default=2048, ge=2, le=MAX_WINDOW_TOKENS)
    """Length of a window, and so the longest prefix plus suffix."""
    suffix_tokens: int = Field(default=128, ge=1, le=MAX_SUFFIX_TOKENS)
    """Length of a chunk's suffix: what is rewritten, rolled out and judged."""
    min_prefix_tokens: int = Field(default=128, ge=1)
    """A chunk with a shorter prefix is only context. The default is one suffix, as in the paper."""
    min_suffix_tokens: int = Field(default=32, ge=1)
    """A shorter tail is only context. The default is a quarter of a suffix; below it, quality can't be compared."""
    window_overlap_tokens: int = Field(default=0, ge=0)
    """Tokens of a window that the next one of the document begins with."""
    chunks_per_window: int = Field(default=0, ge=0)
    """Chunks drawn at random from each window; 0: all of them."""
    end_of_text: bool = True
    """End each document with the tokenizer's end-of-sequence token. False: for pieces of longer documents."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        exceeds = f"exceeds context_tokens = {self.context_tokens}"
        if (shortest := self.min_prefix_tokens + self.min_suffix_tokens) > self.context_tokens:
            raise ValueError(f"min_prefix_tokens + min_suffix_tokens = {shortest} {exceeds}: no chunk would ever fit")
        shortest = self.window_overlap_tokens + self.min_suffix_tokens + 4
        if self.window_overlap_tokens and shortest > self.context_tokens:
            raise ValueError(
                "window_overlap_tokens + min_suffix_tokens + 4 (a BOS, and 3 where a border would cut a character) = "
                f"{shortest} {exceeds}: windows after the first would have no chunk"
            )
        if self.min_suffix_tokens > self.suffix_tokens:
            raise ValueError("min_suffix_tokens must not exceed suffix_tokens")
        return self


class RedisSettings(Section):
    url: Annotated[str, url_of("redis", "rediss", "unix")] = ""
    """Address of Redis; empty: `headwater run` starts one for the run."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Of one call."""


class DatabaseSettings(Section):
    url: Annotated[str, url_of()] = ""
    """SQLAlchemy URL; empty: SQLite in the run folder."""


class WeightsSettings(Section):
    store: Annotated[str, url_of()] = ""
    """Folder or fsspec URL that weight versions are written to; empty: `weights/` in the run folder."""
    push_every: int = Field(default=1, ge=1)
    """Steps between two weight versions for the rollout service, at least: a version that is still being written delays
    the next one."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Dtype of weight versions; empty: rollout.engine.dtype, since replicas would round them anyway."""
    full_every: int = Field(default=10, ge=1)
    """bfloat16: every n-th version is full, the others hold what changed; 1: all are full. A replica that missed a
    version recovers at a full one: full_every * push_every steps must not exceed trainer.max_policy_lag."""
    keep_versions: int = Field(default=3, ge=2)
    """Older versions are deleted. 3 gives a slow replica time to finish its download."""


class ScheduleStage(Section):
    """Which candidates a chunk gets, once the trainer has completed step `from_step`."""

    from_step: int = Field(default=0, ge=0)
    kinds: tuple[CandidateKind, ...] = ("original", "rewrite", "rollout")
    num_rollouts: int = Field(default=16, ge=0, le=MAX_ROLLOUTS)
    num_rewrites: int = Field(default=1, ge=1, le=MAX_REWRITES)
    """Where `kinds` has rewrites. More than one needs rewriter.temperature > 0."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.kinds:
            raise ValueError("a schedule stage needs at least one candidate kind")
        if ("rollout" in self.kinds) != (self.num_rollouts > 0):
            raise ValueError(f"kinds {list(self.kinds)} and num_rollouts = {self.num_rollouts} contradict each other")
        return self

    @property
    def num_candidates(self) -> int:
        """Of a chunk, where all differ."""
        numbers = {"original": 1, "rewrite": self.num_rewrites, "rollout": self.num_rollouts}
        return sum(numbers[kind] for kind in set(self.kinds))


class CollectorSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8004, ge=0, le=65535)
    schedule: tuple[ScheduleStage, ...] = (ScheduleStage(),)
    """Candidates by the trainer's step: the first stage begins at step 0, each later one at a higher step."""
    max_windows_in_flight: int = Field(default=8, ge=1)
    max_backlog: int = Field(default=16, ge=1)
    """A window is begun only while fewer than this are in flight or unread on the stream."""
    max_parts: int = Field(default=4096, ge=1)
    """Most parts of the source that this collector works on at once."""
    lease_s: float = Field(default=15.0, gt=0)
    """A collector that is silent for this long loses its parts to another one."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_backoff_s: float = Field(default=10.0, gt=0)
    """Longest wait between two attempts. The first wait is 0.25 s, each later one twice as long, with jitter."""
    max_attempts: int = Field(default=0, ge=0)
    """Attempts of one request before its chunks are dropped; 0: no limit, while the service is down the run waits."""
    max_dropped_windows: int = Field(default=64, ge=1)
    """Windows in a row that can't be scored, after which the collector stops: it would use up the corpus in vain."""
    rewrite_when: Literal["always", "unsafe"] = "always"
    """`unsafe`: the judge is asked about the original first, which is rewritten only if its `safety` is below
    `unsafe_below`."""
    unsafe_below: float = Field(default=0.5, ge=0, le=1)
    record_share: float = Field(default=0.1, ge=0, le=1)
    """Share of windows whose candidates are kept in the database, for people to read."""
    stay_when_finished: bool = False
    """Idle after the trainer's last step instead of exiting: Kubernetes restarts a Deployment that exits."""

    @model_validator(mode="after")
    def _schedule_is_ordered(self) -> Self:
        steps = [stage.from_step for stage in self.schedule]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"schedule must begin at from_step 0 and ascend, got {steps}")
        return self

    def stage_at(self, step: int) -> ScheduleStage:
        """The stage in force after the trainer's step `step`."""
        return [stage for stage in self.schedule if stage.from_step <= step][-1]


class TrainerSettings(Section):
    objective: ObjectiveName = "dpo"
    """A row of shared/objectives.py: how a chunk's chosen and rejected candidates are picked, and the loss."""
    steps: int = Field(default=2000, ge=1)
    pairs_per_step: int = Field(default=256, ge=1)
    """Pairs of one optimizer step, at least: it takes whole windows until they have as many. For NLL objectives a pair
    is one chosen suffix."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's inverse temperature. The paper does not give it; 0.1 is the default of DPO (arXiv 2305.18290)."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`ipo`: the squared loss of IPO (arXiv 2310.12036), with log-probs per token as in TRL."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """DPO: the share of preferences taken to be wrong (conservative DPO, https://ericmitchell.ai/cdpo.pdf)."""
    length_normalised: bool = False
    """DPO: log-probs per token instead of per suffix (Tulu 3, arXiv 2411.15124, with beta = 5)."""
    nll_weight: float = Field(default=0.0, ge=0)
    """DPO: weight of the NLL per token of the chosen suffixes beside it (arXiv 2404.19733, with weight 1)."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """Its highest value: after a linear warm-up it falls along a cosine."""
    warmup_steps: int = Field(default=100, ge=0)
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of learning_rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """0, since decay pulls towards zero and not towards the reference."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_batch_tokens: int = Field(default=8_192, ge=1)
    """Tokens of one forward pass, padding included; a single pair may have more. A step accumulates gradients over as
    many passes as it needs."""
    layout: Literal["auto", "tree", "separate"] = "auto"
    """`tree`: all candidates of a window share one copy of it. `separate`: each suffix has its own copy of its prefix.
    `auto`: tree, or separate with a warning where the model or the check at the start does not allow it."""
    attention: Literal["auto", "flex", "merged", "dense"] = "auto"
    """Kernel of the tree layout; `auto`: flex on CUDA, merged on CPU. `dense` is the slow reference."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward; losses and sums stay in float32. `auto`: bfloat16 on CUDA, policy.dtype on CPU."""
    reference_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen reference's weights; `auto`: as compute_dtype."""
    compile: bool = False
    """Compile the model's layers with torch.compile."""
    refresh_reference_every: int = Field(default=0, ge=0)
    """Steps after which the policy becomes the new reference; 0: never."""
    max_policy_lag: int = Field(default=16, ge=0)
    """A window is dropped as stale if its oldest rollout was sampled from weights that are more optimizer steps old."""
    max_dropped_windows: int = Field(default=256, ge=1)
    """Windows in a row that arrive only to be dropped, after which the trainer stops: it would use up the corpus in
    vain."""
    replica_wait_s: float = Field(default=0.0, ge=0)
    """How long to wait before a step for live replicas that are further behind than max_policy_lag. 0: a late replica
    loses only its own rollouts, while waiting slows the run to its slowest replica."""
    min_reward_gap: float = Field(default=0.0, ge=0)
    """Candidates whose rewards differ by no more than this are no preference."""
    checkpoint_every: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_bad_steps: int = Field(default=5, ge=1)
    """Consecutive steps with a non-finite loss or gradient, after which the trainer stops."""
    host: str = "127.0.0.1"
    """Address that metrics_port binds. Any other than loopback needs HEADWATER_TOKEN."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Serves /metrics and /healthz; 0: off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_processes: int = Field(default=1, ge=1)
    """Trainer processes that `headwater run` starts on this machine with torchrun, one a GPU. Elsewhere start
    `python -m torch.distributed.run ... -m trainer` yourself (docs/training.md)."""
    num_threads: int = Field(default=1, ge=0)
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    stream_timeout_s: float = Field(default=0.0, ge=0)
    """Stop with an error when no window that can be trained arrives for this long; 0: wait for ever."""
    lease_s: float = Field(default=30.0, gt=0)
    """A trainer that is silent for this long may be replaced by another one."""
    profile_steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """First and last step that torch's profiler records, into `profile/` in the run folder; such as [20, 25]."""
    log_tensorboard: bool = False
    log_wandb: bool = False
    """They need `headwater[tensorboard]` and `headwater[wandb]`."""

    @model_validator(mode="after")
    def _options_fit_the_objective(self) -> Self:
        chosen = [name for name in _DPO_OPTIONS if getattr(self, name) != type(self).model_fields[name].default]
        if chosen and OBJECTIVES[self.objective].loss != "dpo":
            raise ValueError(
                f"objective = '{self.objective}' trains by NLL, which has no {' and no '.join(chosen)}: leave that out"
            )
        if self.dpo_loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning with dpo_loss = 'ipo', which has no sigmoid: leave it out")
        if self.dpo_loss == "ipo" and self.length_normalised:
            raise ValueError("dpo_loss = 'ipo' averages log-probs over tokens in any case: leave length_normalised out")
        return self

    @model_validator(mode="after")
    def _profile_steps_ascend(self) -> Self:
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps = [{first}, {last}] ends before it begins: give [first, last]")
        return self


class Settings(Section):
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
        objective = f"trainer.objective = '{self.trainer.objective}'"
        for stage in self.collector.schedule:
            makes = f"but collector.schedule from step {stage.from_step} makes"
            if missing := OBJECTIVES[self.trainer.objective].kinds - set(stage.kinds):
                kinds = list(stage.kinds)
                raise ValueError(f"{objective} needs candidates of kind {sorted(missing)}, {makes} only {kinds}")
            if self.needs_judge and stage.num_candidates < 2:
                raise ValueError(f"{objective} needs at least two candidates a chunk, {makes} one")
        return self

    @model_validator(mode="after")
    def _rewrites_can_be_made_as_asked(self) -> Self:
        for stage in self.collector.schedule:
            if "rewrite" in stage.kinds and stage.num_rewrites > 1 and not self.rewriter.temperature:
                raise ValueError(
                    f"collector.schedule from step {stage.from_step} has num_rewrites = {stage.num_rewrites}, but "
                    "rewriter.temperature = 0 makes them all equal: raise it to 0.7 or so"
                )
        if self.collector.rewrite_when == "unsafe":
            if not self.needs_judge:
                raise ValueError(
                    f"collector.rewrite_when = 'unsafe' asks the judge, which trainer.objective = "
                    f"'{self.trainer.objective}' does without: choose dpo or rf_nll"
                )
            if not self.safety_criteria:
                raise ValueError(
                    "collector.rewrite_when = 'unsafe' needs a criterion of kind safety: add [judge.criteria.safety]"
                )
        return self

    @model_validator(mode="after")
    def _replicas_can_stay_within_the_lag(self) -> Self:
        push, full, lag = self.weights.push_every, self.weights.full_every, self.trainer.max_policy_lag
        too_old = f"exceeds trainer.max_policy_lag = {lag} steps"
        if push - 1 > lag:
            raise ValueError(
                f"weights.push_every - 1 = {push - 1} {too_old}, so rollouts of the newest weights would be dropped as "
                f"stale: lower push_every to {lag + 1}, or raise max_policy_lag to {push - 1}"
            )
        if self.weights_dtype == "bfloat16" and full > 1 and full * push > lag:
            raise ValueError(
                f"weights.full_every * weights.push_every = {full * push} {too_old}, so rollouts of a replica that "
                f"missed a version would be stale before the next full one: lower full_every to {max(1, lag // push)}, "
                f"or raise max_policy_lag to {full * push}"
            )
        return self

    @model_validator(mode="after")
    def _a_window_fits_every_limit(self) -> Self:
        if found := list(limits.problems(self)):
            raise ValueError("; ".join(found))
        return self

    @property
    def needs_judge(self) -> bool:
        return OBJECTIVES[self.trainer.objective].judged

    @property
    def safety_criteria(self) -> tuple[str, ...]:
        """Names of the judge's criteria of kind safety."""
        return tuple(name for name in self.judge.criteria if self.judge.kind(name) == "safety")

    @property
    def kinds(self) -> frozenset[CandidateKind]:
        """Of candidates that any stage of the schedule makes."""
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
    token: str = ""
    """HEADWATER_TOKEN: the bearer token of every route except health."""

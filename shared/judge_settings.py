"""Settings of the judge: its criteria and how they ask. Part of the tree in shared/settings.py."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.engine_settings import EngineSettings, Section, ServiceSettings

ScheduleName = Literal["tournament", "all_pairs", "pivot"]
Normalisation = Literal["none", "range", "rank", "deviation"]
Verdict = Literal["answer", "structured", "labels"]
CriterionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class CriterionSettings(Section):
    kind: str = ""
    """What it asks or computes: `quality`, `coherence` (of pairs), `safety`, `factuality` (of each candidate alone),
    `likelihood`, `classifier`, `python`, or a question of your own: `pairwise`, `pointwise`. Empty: its name."""
    weight: float = Field(default=1.0, ge=0)
    """Weight in the combined reward; weights are normalised. 0: the criterion only has its threshold."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """A candidate with a lower score is never chosen; it may still be rejected."""
    normalise: Normalisation = "none"
    """How scores are made comparable within a chunk, in [0, 1], before they are weighted. `range`: the lowest is 0, the
    highest 1. `rank`: by place. `deviation`: the normal distribution's share below (score - mean) / deviation."""
    prompt: Path | None = None
    """Prompt file; None: services/judge/prompts/NAME.txt, or NAME_labels.txt for `labels`."""
    verdicts: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Verdict words and their values; in pairs the value for the text shown as A. Empty: those of a shipped kind."""
    verdict: Verdict = "answer"
    """`answer`: the last `Verdict: ...` of a sampled text. `structured`: the same, forced by `vllm` or an endpoint with
    its structured outputs. `labels`: the log-probs of the verdict words after the prompt; the engine must score."""
    schedule: ScheduleName = "tournament"
    """Which pairs are compared. `tournament`: those that matter for the best and the worst, round by round, until both
    are sure. `all_pairs`: each with each, as in the paper. `pivot`: each with one."""
    budget: int = Field(default=0, ge=0)
    """Pairs: the most calls a chunk that a tournament may spend; 0: in proportion to the number of candidates
    (docs/judge.md has the shares of the all-pairs choice that budgets reach)."""
    graded: bool = True
    """Use the probabilities of the verdict words, where the engine gives them, instead of the word that was sampled."""
    samples: int = Field(default=5, ge=1)
    """Verdicts a question, averaged. `labels` needs only one; a tournament asks about more pairs instead."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=0.6, gt=0, le=1)
    max_answer_tokens: int = Field(default=512, ge=1)
    """Longest answer; `structured` counts four characters as a token."""
    engine: EngineSettings | None = None
    """An engine for this criterion; None: judge.engine."""
    lora_adapter: str = ""
    """`vllm`: folder of a LoRA adapter on the engine's model for this criterion."""
    function: str = ""
    """`python`: `module:name` of a function (prefix, candidates, reference) -> scores in [0, 1]."""
    scale: float = Field(default=1.0, gt=0)
    """`likelihood`: the score is sigmoid((log-prob per token - mean of the chunk) / scale). `classifier` with one
    output: sigmoid((output - mean of the chunk) / scale)."""
    model: str = ""
    """`classifier`: folder or Hugging Face name of a sequence classifier or reward model."""
    label: str = ""
    """`classifier`: the class whose probability is the score; empty for a model with one output."""
    sees_prefix: bool = True
    """`classifier`: the text is the end of the prefix and the candidate; false: the candidate alone."""


class JudgeSettings(ServiceSettings):
    port: int = Field(default=8003, ge=0, le=65535)
    criteria: dict[CriterionName, CriterionSettings] = Field(default={"quality": CriterionSettings()})
    chat: bool | None = None
    max_prefix_characters: int = Field(default=8_000, ge=0)
    """This and `chat` as for the rewriter."""
    max_retries: int = Field(default=3, ge=0)
    """How often an unreadable verdict is asked for again, at other seeds and temperatures, before it is missing."""
    engine_patience_s: float = Field(default=30.0, ge=0)
    """How long a question is tried again while the engine fails, before the request is answered 503."""
    remembered_verdicts: int = Field(default=200_000, ge=0)
    """Finished engine calls whose verdicts are kept for requests that are asked again; about 350 bytes each."""
    probe_share: float = Field(default=0.0, ge=0, le=1)
    """Share of windows in which the judge is also asked about a pair whose better text is known (docs/judge.md)."""

    @model_validator(mode="after")
    def _criteria_are_complete(self) -> Self:
        if not self.criteria:
            raise ValueError("judge.criteria is empty: name at least one criterion")
        if not any(criterion.weight for criterion in self.criteria.values()):
            raise ValueError("judge.criteria all have weight 0: give at least one a weight")
        for name, criterion in self.criteria.items():
            if self.kind(name) == "python" and ":" not in criterion.function:
                raise ValueError(f"judge.criteria.{name}.function must be 'module:name'")
            if self.kind(name) == "classifier" and not criterion.model:
                raise ValueError(f"judge.criteria.{name}.model is empty: name a sequence classifier")
        return self

    def kind(self, name: str) -> str:
        """Of the criterion `name`."""
        return self.criteria[name].kind or name

    def engine_of(self, name: str) -> EngineSettings:
        return self.criteria[name].engine or self.engine

    def asks_model(self, name: str) -> bool:
        """Whether the criterion needs a language model's engine."""
        return self.kind(name) not in ("python", "classifier")

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(map(self.kind, self.criteria))

"""The records of a sample: candidates, their judgement, the scored window on the stream.

`token_ids`, the policy's tokens as sampled or cut, are what is trained; `text` is for rewriter, judge and people.

    key = WindowKey(part=0, epoch=0, position=17, window=0)
    assert WindowKey.parse(str(key)) == key             # "0.0.17.0", the id of a window everywhere
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORM = 3
"""Of everything that a run keeps: rows, entries of the stream, checkpoints. Raise it with a change that this version
can't read in an older run, which is then refused (shared/identity.py). 3: an update contains whole windows (checkpoints
of form 2 have half-used ones), and the schedule of candidates goes by steps."""

TRAINER_PART = -1
"""The trainer leases the run as a collector leases a part of its source, under this number: there is one trainer."""

CandidateKind = Literal["original", "rewrite", "rollout"]
CANDIDATE_KINDS: tuple[CandidateKind, ...] = ("original", "rewrite", "rollout")

FinishReason = Literal["length", "stop", "source"]
"""`length`: cut at the suffix length; `stop`: the model ended the text; `source`: raw text, the original."""

TokenIds = tuple[Annotated[int, Field(ge=0)], ...]
Score = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Record(BaseModel):
    """Crosses a process border."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Candidate(Record):
    """One possible suffix for one prefix. Equal token ids are one candidate, whoever made them."""

    kinds: Annotated[tuple[CandidateKind, ...], Field(min_length=1)]
    """Who made it, in the order original, rewrite, rollout; a rollout that was sampled twice is named twice."""
    token_ids: TokenIds
    text: str
    """The tokens decoded after the prefix, without an end-of-text and without half characters at either end."""
    weight_version: int | None = None
    """The oldest weight version that it was sampled under; None unless a rollout is among its kinds."""
    finish_reason: FinishReason = "source"

    @model_validator(mode="after")
    def _kinds_are_in_order_and_fit_the_version(self) -> "Candidate":
        if len(self.kinds) > 1 and list(self.kinds) != sorted(self.kinds, key=CANDIDATE_KINDS.index):
            raise ValueError(f"kinds must stand in the order {', '.join(CANDIDATE_KINDS)}, got {list(self.kinds)}")
        if ("rollout" in self.kinds) != (self.weight_version is not None):
            raise ValueError(f"weight_version belongs to rollouts, got {self.weight_version} on {list(self.kinds)}")
        return self


class Comparison(Record):
    """One verdict on a pair of candidates, by their places in the chunk."""

    criterion: str
    first: int = Field(ge=0)
    """The one that was shown first."""
    second: int = Field(ge=0)
    value: Score | None
    """How far `first` beats `second`: 1 wholly, 0.5 a tie. None: no verdict could be read, and no mean counts it."""


class Judgement(Record):
    """The judge's view of the candidates of one chunk, in their order."""

    rewards: tuple[Score | None, ...]
    """Per candidate the weighted mean of the criteria's scores. None: some criterion could not score it, so it
    is neither chosen nor rejected."""
    scores: dict[str, tuple[Score | None, ...]]
    """By criterion, per candidate, before they are normalised."""
    barred: tuple[int, ...] = ()
    """Candidates below some criterion's threshold, by place: never chosen."""
    comparisons: tuple[Comparison, ...] = ()
    """In the order in which they were asked about."""
    reasoning: str = ""
    """One answer of the judge, unedited; empty where no text was sampled."""
    num_calls: int = Field(ge=0)
    """Engine calls spent on this chunk, failed ones included."""
    num_failures: int = Field(default=0, ge=0)
    """Unreadable verdicts, each of which was asked for again."""
    fingerprint: str
    """Hash of model, prompts and settings: changes exactly when the judge changes."""


class Probe(Record):
    """What the judge said about one pair whose better text is known (services/known_pairs.py). For figures only: it is
    no candidate and never trained."""

    kind: Literal["spoiled", "base"]
    """`spoiled`: an original suffix against itself, spoiled. `base`: an original, a human text, against a rollout that
    the policy of weight version 0 made after the same prefix."""
    spoiling: str = ""
    """How it was spoiled; empty for `base`."""
    value: Score | None
    """1: the original got the higher reward, 0: the other text did, 0.5: a tie. None: the judge could not say."""
    consistent: bool | None = None
    """Whether every pairwise criterion preferred the same text in both orders; None if it was not asked in both."""
    reason: str = ""
    """Why there is no value: a short word that can be counted."""


class ScoredChunk(Record):
    """All candidates for the suffix that starts at `start`."""

    start: int = Field(ge=1)
    """Offset into the window's `token_ids`; the prefix is `token_ids[:start]`."""
    candidates: tuple[Candidate, ...]
    """No two with the same token ids."""
    judgement: Judgement | None = None
    """None where no judge was asked: the objective needs none, or there is only one candidate."""

    @model_validator(mode="after")
    def _candidates_differ_and_have_rewards(self) -> "ScoredChunk":
        num_candidates = len(self.candidates)
        if self.judgement and len(self.judgement.rewards) != num_candidates:
            found = len(self.judgement.rewards)
            raise ValueError(f"{found} rewards for {num_candidates} candidates at {self.start}")
        if len({candidate.token_ids for candidate in self.candidates}) != num_candidates:
            raise ValueError(f"equal candidates at {self.start}: merge them into one that has all their kinds")
        return self


NO_PREFERENCE = "no_preference"
"""Why a chunk was dropped whose candidates are all equal; no judge was asked."""


NON_FINITE = "non_finite_loss"
"""Why the windows of a skipped step were dropped."""


class DroppedChunk(Record):
    start: int
    reason: str


class WindowKey(Record):
    """Where a window comes in the order of reading."""

    part: int = Field(ge=0)
    epoch: int = Field(ge=0)
    position: int = Field(ge=0)
    """Index of the document in the part's shuffled order of this epoch; refused lines take one too."""
    window: int = Field(ge=0)
    """Index within the document."""

    def __str__(self) -> str:
        return f"{self.part}.{self.epoch}.{self.position}.{self.window}"

    @classmethod
    def parse(cls, text: str) -> "WindowKey":
        part, epoch, position, window = (int(piece) for piece in text.split("."))
        return cls(part=part, epoch=epoch, position=position, window=window)


class ScoredWindow(Record):
    """A window with its scored chunks: one entry of the stream."""

    run_id: str
    key: WindowKey
    source_id: str
    """The document's own id, or its place (`file:line`) where it has none."""
    token_ids: TokenIds
    """The raw window in policy tokens, with a BOS where the tokenizer adds one."""
    chunks: tuple[ScoredChunk, ...]
    dropped_chunks: tuple[DroppedChunk, ...] = ()
    read_at: float
    scored_at: float
    seconds: dict[str, float] = {}
    """Wall seconds of waiting by role: rollout, rewrite, judge."""
    probes: tuple[Probe, ...] = ()
    """Of a judge.probe_share of windows."""

    @property
    def window_id(self) -> str:
        return str(self.key)

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """One for each rollout."""
        versions = (candidate.weight_version for chunk in self.chunks for candidate in chunk.candidates)
        return tuple(version for version in versions if version is not None)

    @property
    def oldest_weight_version(self) -> int | None:
        return min(self.weight_versions, default=None)


@dataclass(frozen=True)
class Lease:
    """One taking of a part of the source by a collector, or of the run by its trainer (TRAINER_PART)."""

    part: int
    owner: str
    """The process's name, which no other has."""
    epoch: int
    """The fencing number: 1, 2, ..., raised whenever the part is taken."""

    @property
    def loss(self) -> str:
        """What has happened if a write under it is refused, for the error's sentence."""
        if self.part == TRAINER_PART:
            return f"another trainer has taken over the run after lease number {self.epoch}"
        return f"part {self.part} was taken by another collector after lease number {self.epoch}"

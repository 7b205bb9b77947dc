"""The records of a sample's way: candidates, their judgement, the scored document on the stream.

All are frozen and refuse unknown keys, since they cross process borders. Tokens are the truth: `token_ids`
are the policy's tokens as sampled or cut; `text` is for teacher, judge and people.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

CandidateKind = Literal["original", "rewrite", "rollout"]
CANDIDATE_KINDS: tuple[CandidateKind, ...] = ("original", "rewrite", "rollout")

FinishReason = Literal["length", "stop", "source"]
"""`length`: cut at the suffix length; `stop`: the model ended by itself; `source`: raw text, the original."""

TokenIds = tuple[Annotated[int, Field(ge=0)], ...]
Score = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Record(BaseModel):
    """Base of everything that crosses a process border."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Candidate(Record):
    """One possible suffix for one prefix. Equal token ids are one candidate, whoever made them."""

    kinds: Annotated[tuple[CandidateKind, ...], Field(min_length=1)]
    """One entry for each time that it was made: original, rewrite, rollouts, in this order. A rollout that was
    sampled twice stands twice."""
    token_ids: TokenIds
    """Policy tokens, at most as many as the chunk has; an end-of-text is the last one."""
    text: str
    """What they say after the prefix, but for an end-of-text and a character cut at either end."""
    weight_version: int | None = None
    """The oldest weight version that it was sampled under; None exactly when no rollout is among its kinds."""
    finish_reason: FinishReason = "source"

    @model_validator(mode="after")
    def _kinds_stand_in_their_order(self) -> "Candidate":
        if len(self.kinds) > 1 and list(self.kinds) != sorted(self.kinds, key=CANDIDATE_KINDS.index):
            raise ValueError(f"kinds must stand in the order {', '.join(CANDIDATE_KINDS)}, got {list(self.kinds)}")
        return self

    @model_validator(mode="after")
    def _rollouts_carry_their_version(self) -> "Candidate":
        if ("rollout" in self.kinds) != (self.weight_version is not None):
            raise ValueError(f"weight_version belongs to rollouts, got {self.weight_version} on {list(self.kinds)}")
        return self


class Judgement(Record):
    """What the judge said about the candidates of one chunk, in their order."""

    rewards: tuple[float, ...]
    """Combined reward per candidate: the weighted mean of the criteria's scores, in [0, 1]."""
    scores: dict[str, tuple[Score, ...]]
    """Per criterion one score in [0, 1] per candidate."""
    reasoning: str = ""
    """One sampled answer of the judge as it was written; empty where no text was sampled."""
    num_calls: int = Field(ge=0)
    """Engine calls spent on this chunk, failed ones included."""
    num_failures: int = Field(default=0, ge=0)
    """Verdicts that could not be read and were asked for again."""
    fingerprint: str
    """Hash of model, prompts and settings: changes exactly when the judge changes."""


class ScoredChunk(Record):
    """All candidates for the suffix that starts at `start`."""

    start: int = Field(ge=1)
    """Offset into the window's `token_ids`; the prefix is `token_ids[:start]`."""
    candidates: tuple[Candidate, ...]
    """No two with the same token ids."""
    judgement: Judgement | None = None
    """None where no judge was asked: the objective needs none (`next_token`, `sft_*`, `dpo_rewrite_over_rollout`), or
    there is one candidate only."""

    @model_validator(mode="after")
    def _one_reward_per_candidate(self) -> "ScoredChunk":
        if self.judgement and len(self.judgement.rewards) != len(self.candidates):
            raise ValueError(
                f"{len(self.judgement.rewards)} rewards for {len(self.candidates)} candidates at {self.start}"
            )
        return self

    @model_validator(mode="after")
    def _no_two_candidates_are_equal(self) -> "ScoredChunk":
        if len({candidate.token_ids for candidate in self.candidates}) != len(self.candidates):
            raise ValueError(f"equal candidates at {self.start}: merge them into one that has all their kinds")
        return self


NO_PREFERENCE = "no_preference"
"""The reason of a chunk whose candidates are all equal: nothing can be preferred, and no judge was asked."""


class DroppedChunk(Record):
    """A chunk that could not be scored, with the reason; it is counted, never trained."""

    start: int
    reason: str


class WindowKey(Record):
    """Where a document window came from: the order of reading, not the document's own name."""

    part: int = Field(ge=0)
    """Which part of the source (parts are leased by collectors)."""
    epoch: int = Field(ge=0)
    position: int = Field(ge=0)
    """Index in the part's shuffled order within the epoch; refused lines take a position too."""
    window: int = Field(ge=0)
    """Long documents become several windows."""

    def __str__(self) -> str:
        return f"{self.part}.{self.epoch}.{self.position}.{self.window}"

    @classmethod
    def parse(cls, text: str) -> "WindowKey":
        part, epoch, position, window = (int(piece) for piece in text.split("."))
        return cls(part=part, epoch=epoch, position=position, window=window)


class ScoredWindow(Record):
    """One document window with its scored chunks: the unit on the stream and of acknowledgement."""

    run_id: str
    key: WindowKey
    source_id: str
    """The document's own id, or its place (`file:line`) where it has none."""
    token_ids: TokenIds
    """The raw window in policy tokens (the trunk), BOS included where the tokenizer wants one."""
    chunks: tuple[ScoredChunk, ...]
    dropped_chunks: tuple[DroppedChunk, ...] = ()
    read_at: float
    scored_at: float
    """Unix seconds."""
    seconds: dict[str, float] = {}
    """Wall seconds spent waiting by role: generate, rewrite, judge."""

    @property
    def window_id(self) -> str:
        return str(self.key)

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Of all rollouts."""
        return tuple(
            candidate.weight_version
            for chunk in self.chunks
            for candidate in chunk.candidates
            if candidate.weight_version is not None
        )

    @property
    def oldest_weight_version(self) -> int | None:
        return min(self.weight_versions, default=None)


@dataclass(frozen=True)
class Lease:
    """One taking of a part."""

    part: int
    owner: str
    """The collector's name, unique per process."""
    epoch: int
    """The fencing number, from 1: raised each time that the part is taken."""

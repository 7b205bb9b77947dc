"""What crosses a process border is checked there."""

import pytest
from pydantic import ValidationError

from shared.records import Candidate, Judgement, ScoredChunk, ScoredWindow, WindowKey

ORIGINAL = Candidate(kinds=("original",), token_ids=(1, 2), text="ab")


def _rollout(version: int, token: int = 3) -> Candidate:
    return Candidate(kinds=("rollout",), token_ids=(token,), text="c", weight_version=version, finish_reason="length")


def _document(*candidates: Candidate) -> ScoredWindow:
    return ScoredWindow(
        run_id="r",
        key=WindowKey(part=0, epoch=1, position=2, window=3),
        source_id="a:1",
        token_ids=(1, 2, 3),
        chunks=(ScoredChunk(start=1, candidates=candidates),),
        read_at=0.0,
        scored_at=1.0,
    )


def test_a_candidate_may_have_several_kinds() -> None:
    copied = Candidate(kinds=("original", "rewrite", "rollout", "rollout"), token_ids=(1,), text="a", weight_version=0)
    assert copied.weight_version == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kinds": ["rollout"]}, "weight_version belongs to rollouts"),
        ({"weight_version": 0}, "weight_version belongs to rollouts"),
        ({"kinds": [], "weight_version": 0}, "kinds"),
        ({"kinds": ["rollout", "original"], "weight_version": 0}, "kinds"),
        ({"score": 1}, "Extra inputs"),
        ({"token_ids": [-1]}, "token_ids"),
    ],
)
def test_a_candidate_that_can_not_be_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Candidate.model_validate({"kinds": ["original"], "token_ids": [1], "text": "a"} | given)


def test_equal_candidates_of_a_chunk_are_refused() -> None:
    with pytest.raises(ValidationError, match="equal candidates at 1: merge them"):
        ScoredChunk(start=1, candidates=(_rollout(1), _rollout(2)))


def test_records_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ORIGINAL.text = "other"


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_score_lies_between_0_and_1(score: float) -> None:
    with pytest.raises(ValidationError):
        Judgement(rewards=(0.5,), scores={"quality": (score,)}, num_calls=1, fingerprint="f")


def test_every_candidate_has_a_reward() -> None:
    judgement = Judgement(rewards=(0.5,), scores={}, num_calls=1, fingerprint="f")
    with pytest.raises(ValidationError, match="1 rewards for 2 candidates at 1"):
        ScoredChunk(start=1, candidates=(ORIGINAL, _rollout(0)), judgement=judgement)


def test_a_document_key_survives_its_text() -> None:
    key = WindowKey(part=7, epoch=0, position=12, window=3)
    assert str(key) == "7.0.12.3"
    assert WindowKey.parse("7.0.12.3") == key


def test_the_oldest_rollout_gives_a_document_its_version() -> None:
    assert _document(ORIGINAL, _rollout(4), _rollout(2, token=4)).oldest_weight_version == 2
    assert _document(ORIGINAL).oldest_weight_version is None
    assert _document(ORIGINAL).window_id == "0.1.2.3"

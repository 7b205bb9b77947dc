"""Equal candidates are one: where pools are built, and what that does to the pairs."""

from collections import Counter
from collections.abc import Sequence

from prometheus_client import Counter as Counter_

from services.collector.collect import Pool, build_pools, count_chunks, sort_chunks
from services.collector.windows import Chunk, TextSpan, Window, WindowText
from shared import metrics
from shared.api import Rewrite, Rollout
from shared.records import Judgement, ScoredWindow, WindowKey
from shared.settings import Objective, ScheduleStage
from trainer.preferences import select_pairs

PREFIX, ORIGINAL = (1, 2), (3, 4)
BAD, GOOD = (5, 6), (7, 8)
STAGE = ScheduleStage(num_rollouts=2)
TEXT = WindowText("ab cd", (TextSpan(2, 5),))


def window(position: int = 0) -> Window:
    """One chunk: prefix `ab`, original ` cd`."""
    key = WindowKey(part=0, epoch=0, position=position, window=0)
    return Window(key, f"d{position}", PREFIX + ORIGINAL, (Chunk(2, 4),), read_at=0.0)


def rollout(token_ids: tuple[int, ...], version: int) -> Rollout:
    return Rollout(token_ids=token_ids, text=str(token_ids), finish_reason="length", weight_version=version)


def pool_of(rewrite: tuple[int, ...], *rollouts: Rollout) -> Pool:
    rewrites = [Rewrite(token_ids=rewrite, text=str(rewrite), finish_reason="length")]
    (pool,) = build_pools(window(), TEXT, stage=STAGE, rewrites=rewrites, rollouts=[rollouts])
    return pool


def scored(pool: Pool, rewards: Sequence[float], position: int = 0) -> ScoredWindow:
    judgement = Judgement(rewards=tuple(rewards), scores={}, num_calls=1, fingerprint="f")
    chunks, dropped = sort_chunks(window(position), [pool], {0: judgement}, objective="dpo")
    return ScoredWindow(
        run_id="r",
        key=window(position).key,
        source_id="d",
        token_ids=PREFIX + ORIGINAL,
        chunks=tuple(chunks),
        dropped_chunks=tuple(dropped),
        read_at=0.0,
        scored_at=0.0,
    )


def test_an_exact_copy_by_the_teacher_is_one_candidate_with_the_original() -> None:
    pool = pool_of(ORIGINAL, rollout(GOOD, 4), rollout(BAD, 4))
    assert [candidate.token_ids for candidate in pool] == [ORIGINAL, GOOD, BAD]


def test_a_copy_does_not_shift_the_share_of_chosen_rollouts() -> None:
    """The copied original and one rollout tie for the best: each is chosen in half of all windows. With a ticket
    for each copy the rollout had a third."""
    pool = pool_of(ORIGINAL, rollout(GOOD, 4), rollout(BAD, 4))
    rewards = [0.1 if candidate.token_ids == BAD else 0.9 for candidate in pool]
    chosen = Counter(
        select_pairs(scored(pool, rewards, position), "dpo", min_reward_gap=0.0, seed=0).pairs[0].chosen.token_ids
        for position in range(600)
    )
    assert 260 < chosen[GOOD] < 340, chosen


def test_every_kind_that_made_it_is_kept_with_the_oldest_version() -> None:
    copied, other = pool_of(ORIGINAL, rollout(ORIGINAL, 5), rollout(GOOD, 4))
    assert (copied.kinds, copied.weight_version) == (("original", "rewrite", "rollout"), 5)
    assert (copied.text, copied.finish_reason) == (" cd", "source")
    assert (other.kinds, other.weight_version) == (("rollout",), 4)
    _, _, twice = pool_of(BAD, rollout(GOOD, 6), rollout(GOOD, 3))
    assert (twice.kinds, twice.weight_version) == (("rollout", "rollout"), 3)


def test_all_equal_is_no_preference_and_one_alone_is_too_few() -> None:
    (copied,) = pool_of(ORIGINAL, rollout(ORIGINAL, 1), rollout(ORIGINAL, 1))
    alone = copied.model_copy(update={"kinds": ("original",), "weight_version": None})
    for pool, reason in (((copied,), "no_preference"), ((alone,), "too_few_candidates"), ((), "too_few_candidates")):
        scored_chunks, dropped = sort_chunks(window(), [pool], {}, objective="dpo")
        assert (scored_chunks, [lost.reason for lost in dropped]) == ([], [reason])


def test_one_alone_is_scored_without_a_judge_where_one_is_enough() -> None:
    """Rollouts of a policy from scratch can't be shown: the original is the best of its pool."""
    unusable = [
        Rollout(token_ids=GOOD, text="", finish_reason="length", weight_version=1, refusal="broken_text")
        for _ in range(2)
    ]
    (pool,) = build_pools(window(), TEXT, stage=STAGE, rewrites=(), rollouts=[unusable])
    (chunk,), dropped = sort_chunks(window(), [pool], {}, objective="rf_nll")
    assert ([candidate.kinds for candidate in chunk.candidates], chunk.judgement, dropped) == (
        [("original",)],
        None,
        [],
    )


def test_a_rollout_alone_is_trained_only_where_no_judge_was_to_be_asked() -> None:
    _, alone = pool_of(ORIGINAL, rollout(GOOD, 1))
    objectives: tuple[Objective, ...] = ("dpo", "rf_nll", "sft_rollout")
    kept = {name: len(sort_chunks(window(), [(alone,)], {}, objective=name)[0]) for name in objectives}
    assert kept == {"dpo": 0, "rf_nll": 0, "sft_rollout": 1}


def test_copies_count_in_the_metrics_as_often_as_they_were_made() -> None:
    def count(metric: Counter_, kind: str) -> float:
        return float(metric.labels(kind)._value.get())

    kinds = ("original", "rewrite", "rollout")
    pool = pool_of(ORIGINAL, rollout(ORIGINAL, 1), rollout(GOOD, 1))
    before = [count(metrics.candidates_total, kind) for kind in kinds]
    rewards_before = [count(metrics.candidate_reward_sum, kind) for kind in kinds]
    count_chunks(scored(pool, (0.25, 0.5)).chunks, ())
    assert [count(metrics.candidates_total, kind) - past for kind, past in zip(kinds, before, strict=True)] == [1, 1, 2]
    rewards = [
        count(metrics.candidate_reward_sum, kind) - past for kind, past in zip(kinds, rewards_before, strict=True)
    ]
    assert rewards == [0.25, 0.25, 0.75]

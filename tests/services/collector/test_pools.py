"""Equal candidates are one: where pools are built, and what that does to the pairs."""

from collections import Counter
from collections.abc import Sequence

from prometheus_client import Counter as Counter_

from services.collector.pools import Pool, build_pools, count_chunks, sort_chunks
from services.collector.windows import Chunk, TextSpan, Window, WindowText
from shared import metrics
from shared.api import Rewrite, Rollout
from shared.records import Judgement, ScoredWindow, WindowKey
from shared.settings import ScheduleStage
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


def rewrite_of(token_ids: tuple[int, ...]) -> Rewrite:
    return Rewrite(token_ids=token_ids, text=str(token_ids), finish_reason="length")


def pool_of(rewrite: tuple[int, ...], *rollouts: Rollout) -> Pool:
    rewrites = [[rewrite_of(rewrite)]]
    (pool,) = build_pools(window(), TEXT, stage=STAGE, rewrites=rewrites, rollouts=[rollouts])
    return pool


def scored(
    pool: Pool, rewards: Sequence[float | None], position: int = 0, barred: tuple[int, ...] = ()
) -> ScoredWindow:
    judgement = Judgement(rewards=tuple(rewards), scores={}, barred=barred, num_calls=1, fingerprint="f")
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
    objectives = ("dpo", "rf_nll", "sft_rollout")
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


def test_several_rewrites_of_a_chunk_are_candidates_before_its_rollouts() -> None:
    rewrites = [[rewrite_of(GOOD), rewrite_of(BAD), rewrite_of(GOOD)]]
    (pool,) = build_pools(window(), TEXT, stage=STAGE, rewrites=rewrites, rollouts=[[rollout((9,), 1)]])
    assert [(candidate.kinds, candidate.token_ids) for candidate in pool] == [
        (("original",), ORIGINAL), (("rewrite", "rewrite"), GOOD), (("rewrite",), BAD), (("rollout",), (9,)),
    ]  # fmt: skip


def test_an_end_of_text_alone_stays_a_candidate() -> None:
    ended = Rollout(token_ids=(1,), text="", finish_reason="stop", weight_version=2)
    assert pool_of(GOOD, ended)[-1].token_ids == (1,)


def test_a_safe_original_that_nothing_was_made_of_is_dropped_as_such() -> None:
    (alone,) = build_pools(window(), TEXT, stage=STAGE, rewrites=[()], rollouts=())
    for spared, reason in (({0}, "safe_original"), (set(), "too_few_candidates")):
        _, dropped = sort_chunks(window(), [alone], {}, objective="dpo", spared=spared)
        assert [lost.reason for lost in dropped] == [reason]


def test_unscored_candidates_are_in_no_mean_and_barred_ones_are_counted() -> None:
    def count(metric: Counter_, kind: str) -> float:
        return float(metric.labels(kind)._value.get())

    watched = [
        (metrics.candidates_total, "rollout"), (metrics.candidates_scored_total, "rollout"),
        (metrics.candidate_reward_sum, "rollout"), (metrics.candidates_barred_total, "rollout"),
        (metrics.candidates_barred_total, "original"),
    ]  # fmt: skip
    before = [count(*one) for one in watched]
    pool = pool_of(ORIGINAL, rollout(BAD, 1), rollout(GOOD, 1))
    count_chunks(scored(pool, (0.5, None, 0.25), barred=(2,)).chunks, ())
    assert [count(*one) - past for one, past in zip(watched, before, strict=True)] == [2, 1, 0.25, 1, 0]

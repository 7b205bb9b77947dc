"""What a configuration can't do is refused while it is read, with the numbers and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import zstandard

from shared import limits
from shared.api import JudgedText, JudgementItem, JudgementRequest, RolloutRequest
from shared.configuration import load_settings
from shared.errors import SettingsError
from shared.records import Candidate, Comparison, Judgement, ScoredChunk, ScoredWindow, WindowKey
from shared.settings import Settings
from shared.stream import encode

POOL = tuple(
    Candidate(kinds=("rollout",), token_ids=(123_456,) * 7 + (number,), text="ten chars!" * 8, weight_version=100_000)
    for number in range(18)
)


def settings(context: int = 131_072, suffix: int = 128, rollouts: int = 16, **sections: Any) -> Settings:
    data: dict[str, Any] = {
        "chunks": {"context_tokens": context, "suffix_tokens": suffix, "min_suffix_tokens": min(32, suffix)},
        "collector": {"schedule": [{"num_rollouts": rollouts}]},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return Settings.model_validate(data)


def test_windows_of_128k_tokens_fit_as_they_come() -> None:
    """1,049 chunks (131,072 / 125) of 18 candidates: 12 bytes for each token of the window and of the candidates (one
    suffix more, for a tail), 32 bytes around each candidate and 120 around each chunk."""
    assert limits.most_chunks(settings()) == 1049
    judge = 1000 + 12 * (131_072 + 18 * (131_072 + 128)) + 1049 * (120 + 18 * 32)
    assert limits.request_bytes(settings())["judge"] == judge == 30_643_168
    assert limits.request_bytes(settings(rollouts=4))["judge"] < 12_000_000


def test_128k_tokens_in_suffixes_of_8_fit_with_a_judge_that_writes_no_reasons() -> None:
    judge = {"criteria": {"quality": {"verdict": "labels", "budget": 36}}}
    assert limits.most_chunks(settings(suffix=8, rollouts=8, judge=judge)) == 26_215


def test_every_rewrite_of_a_chunk_counts_as_a_candidate() -> None:
    """Two more candidates: 12 bytes for each of their tokens, 32 around each."""
    schedule = {"schedule": [{"num_rollouts": 16, "num_rewrites": 3}]}
    more = settings(rewriter={"temperature": 0.7}, collector=schedule)
    found, before = limits.request_bytes(more), limits.request_bytes(settings())
    assert found["judge"] - before["judge"] == 2 * (12 * (131_072 + 128) + 1049 * 32)
    assert (found["rewriter"], found["rollout"]) == (before["rewriter"], before["rollout"])
    assert limits.entry_bytes(more) > limits.entry_bytes(settings()) + 2 * 17 * 131_072


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"suffix": 5}, r"131,072 in suffixes of chunks\.suffix_tokens = 5 are 65,536 chunks a window, requests take "),
        ({"rollouts": 128}, r"candidates for each of 1,049 chunks makes requests of up to \d.* to the judge, judge\."),
        (
            {"rollouts": 128, "judge": {"max_request_bytes": 10**9}},
            r"entry of up to 33\d,.* which takes 268,435,456: ",
        ),
        ({"judge": {"max_request_bytes": 10**6}}, r"judge\.max_request_bytes = 1,000,000 allows fewer: raise it, or"),
        ({"rewriter": {"max_request_bytes": 10**6}}, r"to the rewriter, rewriter\.max_request_bytes = 1,000,000"),
        ({"rollout": {"max_request_bytes": 10**5}}, r"to the rollout, rollout\.max_request_bytes = 100,000 allows"),
        ({"context": 2_000_000}, "less than or equal to 1000000"),
        ({"suffix": 10_000}, "less than or equal to 8192"),
        ({"rollout": {"temperature": 11.0}}, "less than or equal to 10"),
        ({"collector": {"request_timeout_s": 60}}, r"request_timeout_s = 60 is less than rollout\.engine\.timeout_s"),
    ],
)
def test_what_can_not_work_is_refused_in_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**given)


def test_fewer_chunks_of_a_window_fit_where_all_do_not() -> None:
    whole = {"context_tokens": 131_072, "suffix_tokens": 4, "min_suffix_tokens": 4}
    drawn = settings(chunks=whole | {"chunks_per_window": 64})
    assert limits.most_chunks(drawn) == 64


def test_only_services_that_are_asked_are_looked_at() -> None:
    schedule = {"schedule": [{"kinds": ["original"], "num_rollouts": 0}]}
    small = {"max_request_bytes": 1}
    settings(judge=small, rewriter=small, rollout=small, trainer={"objective": "next_token"}, collector=schedule)


def test_a_service_elsewhere_has_its_own_time_limit() -> None:
    url = {"url": "http://127.0.0.1:1"}
    settings(collector={"request_timeout_s": 60}, rollout=url, rewriter=url, judge=url)


def test_the_command_line_gets_it_as_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[chunks]\ncontext_tokens = 131072\nsuffix_tokens = 2\nmin_suffix_tokens = 2\n")
    with pytest.raises(SettingsError, match="131,072 chunks a window") as caught:
        load_settings(path, environ={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criteria", [{"quality": {}}, {"likelihood": {}}])
def test_the_bounds_hold_for_a_window_of_long_words(criteria: dict[str, Any]) -> None:
    """Every token has ten characters and an id of six digits, every chunk all of its candidates."""
    chosen = settings(context=2048, suffix=8, judge={"criteria": criteria})
    ids = (123_456,) * 8
    candidates = tuple(JudgedText(text="ten chars!" * 8, token_ids=ids) for _ in range(18))
    items = tuple(
        JudgementItem(start=80 * i, end=80 * i + 80, candidates=candidates, token_start=8 * i + 1) for i in range(256)
    )
    request = JudgementRequest(text="ten chars!" * 2048, token_ids=ids * 256, items=items)
    if "likelihood" not in criteria:
        bare = tuple(JudgedText(text=candidate.text) for candidate in candidates)
        texts = tuple(JudgementItem(start=item.start, end=item.end, candidates=bare) for item in items)
        request = JudgementRequest(text=request.text, items=texts)
    judge = len(request.model_dump_json(exclude_unset=True))
    assert judge <= limits.request_bytes(chosen)["judge"] < 2 * judge
    rollouts = RolloutRequest(
        token_ids=ids * 256, starts=tuple(range(8, 2048, 8)), num_rollouts=16, max_suffix_tokens=8
    )
    assert len(rollouts.model_dump_json()) <= limits.request_bytes(chosen)["rollout"]


@pytest.mark.parametrize(
    ("criterion", "most"),
    [
        ({"schedule": "tournament"}, 9 * 18),
        ({"schedule": "tournament", "budget": 400}, 400),
        ({"schedule": "all_pairs"}, 153 * 5),
        ({"schedule": "pivot", "samples": 1}, 17 * 2),
    ],
)
def test_an_entry_has_room_for_the_comparisons_of_every_pairwise_criterion(
    criterion: dict[str, Any], most: int
) -> None:
    pairwise = {"quality": criterion, "mine": criterion | {"kind": "pairwise"}, "safety": {}}
    assert limits.most_comparisons(settings(judge={"criteria": pairwise})) == 2 * most


def test_the_bound_of_an_entry_holds_for_a_window_of_long_words() -> None:
    chosen = settings(context=2048, suffix=8)
    comparison = Comparison(criterion="quality", first=16, second=17, value=0.123456789)
    judgement = Judgement(
        rewards=(0.5,) * 18,
        scores={"quality": (0.5,) * 18},
        comparisons=(comparison,) * 153,
        reasoning="ten chars!" * 512,
        num_calls=1,
        fingerprint="f",
    )
    document = ScoredWindow(
        run_id="r",
        key=WindowKey(part=0, epoch=0, position=0, window=0),
        source_id="d",
        token_ids=(123_456,) * 2048,
        chunks=tuple(ScoredChunk(start=start, candidates=POOL, judgement=judgement) for start in range(8, 2048, 8)),
        read_at=0.0,
        scored_at=0.0,
    )
    packed = len(zstandard.ZstdDecompressor().decompress(encode(document)))
    assert packed <= limits.entry_bytes(chosen) < 2 * packed

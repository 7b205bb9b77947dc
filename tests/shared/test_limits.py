"""What a configuration can't do is refused while it is read, with the numbers and the remedy."""

from pathlib import Path
from typing import Any

import pytest

from shared import limits
from shared.api import JudgedText, JudgementItem, JudgementRequest, RolloutRequest
from shared.configuration import load_settings
from shared.errors import SettingsError
from shared.settings import Settings


def settings(context: int = 131_072, suffix: int = 128, rollouts: int = 16, **sections: Any) -> Settings:
    data: dict[str, Any] = {
        "chunks": {"context_tokens": context, "suffix_tokens": suffix, "min_suffix_tokens": min(32, suffix)},
        "collector": {"schedule": [{"num_rollouts": rollouts}]},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return Settings.model_validate(data)


def test_windows_of_128k_tokens_fit_as_they_come() -> None:
    """1,024 chunks of 18 candidates: 128 tokens of 12 bytes and 32 around them, 28.9 MB; 1.6 MB of the window."""
    assert limits.most_chunks(settings()) == 1024
    judge = 1000 + 131_072 * 12 + 1024 * (120 + 18 * (32 + 128 * 12))
    assert limits.request_bytes(settings())["judge"] == judge == 30_598_120
    assert limits.request_bytes(settings(rollouts=4))["judge"] < 12_000_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"suffix": 4}, r"131,072 in suffixes of chunks\.suffix_tokens = 4 are 32,768 chunks a window, requests take "),
        ({"rollouts": 128}, r"candidates for each of 1,024 chunks makes requests of up to \d.* to the judge, judge\."),
        (
            {"rollouts": 128, "judge": {"max_request_bytes": 10**9}},
            r"entry of up to 3\d\d,.* which takes 268,435,456: ",
        ),
        ({"judge": {"max_request_bytes": 10**6}}, r"judge\.max_request_bytes = 1,000,000 allows fewer: raise it, or"),
        ({"rewriter": {"max_request_bytes": 10**6}}, r"to the rewriter, rewriter\.max_request_bytes = 1,000,000"),
        ({"rollout": {"max_request_bytes": 10**5}}, r"to the rollout, rollout\.max_request_bytes = 100,000 allows"),
        ({"context": 2_000_000}, "less than or equal to 1000000"),
        ({"suffix": 10_000}, "less than or equal to 8192"),
        ({"rollout": {"temperature": 11.0}}, "less than or equal to 10"),
        ({"collector": {"request_timeout_s": 60}}, r"request_timeout_s = 60 is less than rollout\.engine\.timeout_s"),
        (
            {"suffix": 32, "rewriter": {"engine": {"kind": "openai", "endpoint": "http://127.0.0.1:1/v1"}}},
            r"asks the rewriter's endpoint 4,096 times at once, rewriter\.engine\.max_queued_requests = 1,024",
        ),
    ],
)
def test_what_can_not_work_is_refused_in_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**given)


def test_fewer_chunks_of_a_window_fit_where_all_do_not() -> None:
    whole = {"context_tokens": 131_072, "suffix_tokens": 4, "min_suffix_tokens": 4}
    drawn = settings(chunks=whole | {"chunks_per_document": 64})
    assert limits.most_chunks(drawn) == 64


def test_only_services_that_are_asked_are_looked_at() -> None:
    alone = {
        "judge": {"max_request_bytes": 1},
        "rewriter": {"max_request_bytes": 1},
        "rollout": {"max_request_bytes": 1},
    }
    schedule = {"schedule": [{"kinds": ["original"], "num_rollouts": 0}]}
    settings(**alone, trainer={"objective": "next_token"}, collector=schedule)


def test_a_service_elsewhere_has_its_own_time_limit() -> None:
    url = {"url": "http://127.0.0.1:1"}
    settings(collector={"request_timeout_s": 60}, rollout=url, rewriter=url, judge=url)


def test_the_command_line_gets_it_as_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[chunks]\ncontext_tokens = 131072\nsuffix_tokens = 2\nmin_suffix_tokens = 2\n")
    with pytest.raises(SettingsError, match="65,536 chunks a window") as caught:
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
    assert 0.7 * limits.request_bytes(chosen)["judge"] < judge <= limits.request_bytes(chosen)["judge"]
    rollouts = RolloutRequest(
        token_ids=ids * 256, starts=tuple(range(8, 2048, 8)), num_rollouts=16, max_suffix_tokens=8
    )
    assert len(rollouts.model_dump_json()) <= limits.request_bytes(chosen)["rollout"]

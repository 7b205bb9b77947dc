"""POST /v1/rollouts over HTTP, on a tiny policy."""

from pathlib import Path

import httpx
import pytest

from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import RolloutRequest, RolloutResponse
from tests.services.rollout.conftest import HEADERS

DOCUMENT = list(range(20, 80))


def ask(url: str, **changes: object) -> httpx.Response:
    body = {"token_ids": DOCUMENT, "starts": [16, 40], "num_rollouts": 3, "max_suffix_tokens": 8, "seed": 5} | changes
    return httpx.post(f"{url}/v1/rollouts", json=body, headers=HEADERS, timeout=30)


def rollouts(url: str, **changes: object) -> list[list[tuple[int, ...]]]:
    answer = RolloutResponse.model_validate_json(ask(url, **changes).content)
    return [[rollout.token_ids for rollout in of_start] for of_start in answer.rollouts]


def test_every_start_gets_its_rollouts(url: str) -> None:
    answer = RolloutResponse.model_validate_json(ask(url).content)
    assert [len(of_start) for of_start in answer.rollouts] == [3, 3]
    for rollout in answer.rollouts[0]:
        assert 1 <= len(rollout.token_ids) <= 8
        assert rollout.weight_version == 0


def test_a_rollout_that_can_not_be_shown_says_why_and_shows_nothing(url: str, tiny_model: Path) -> None:
    """A random policy over bytes: hardly any of its rollouts is whole UTF-8."""
    codec = TokenCodec(load_tokenizer(str(tiny_model), setting="policy.model"))
    answer = RolloutResponse.model_validate_json(ask(url, num_rollouts=64).content)
    found = [rollout for of_start in answer.rollouts for rollout in of_start]
    assert {rollout.refusal for rollout in found} == {"", "broken_text"}
    for rollout in found:
        before = DOCUMENT[:16] if rollout in answer.rollouts[0] else DOCUMENT[:40]
        shown = codec.continuation(before, rollout.token_ids)
        assert (rollout.text, rollout.refusal) == ("" if shown.flaw else shown.text, shown.flaw)


def test_each_start_has_its_own_bound_and_the_samples_stay_the_same(url: str) -> None:
    long, short = rollouts(url), rollouts(url, max_suffix_tokens=[8, 3])
    assert short == [long[0], [token_ids[:3] for token_ids in long[1]]]


def test_the_same_request_gives_the_same_rollouts(url: str) -> None:
    assert rollouts(url) == rollouts(url)
    assert rollouts(url) != rollouts(url, seed=6)


def test_answers_keep_the_order_of_the_starts(url: str) -> None:
    forward, backward = (rollouts(url, starts=starts, temperature=0) for starts in ([16, 40], [40, 16]))
    assert forward == backward[::-1]
    assert forward[0] != forward[1]


def test_too_long_a_prefix_is_refused_for_good(url: str) -> None:
    answer = ask(url, token_ids=[9] * 300, starts=[300])
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "PromptError"
    assert "300 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "changes",
    [{"starts": [61]}, {"num_rollouts": 0}, {"token_ids": [-1]}, {"max_suffix_tokens": [8]}, {"colour": "red"}],
)
def test_a_wrong_request_is_422(url: str, changes: dict[str, object]) -> None:
    answer = ask(url, **changes)
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "InvalidRequest")


def test_the_token_is_needed(url: str) -> None:
    assert httpx.post(f"{url}/v1/rollouts", json={}).status_code == 401


def test_the_example_in_the_schema_is_valid(url: str) -> None:
    schema = httpx.get(f"{url}/openapi.json", headers=HEADERS).json()
    (example,) = schema["components"]["schemas"]["RolloutRequest"]["examples"]
    assert RolloutRequest.model_validate(example).num_rollouts == 4


def test_readiness_names_model_and_version(url: str) -> None:
    answer = httpx.get(f"{url}/readyz").json()
    assert answer["ready"]
    assert answer["engine"].startswith("transformers:")
    assert answer["weight_version"] == 0


def test_work_for_a_caller_who_hung_up_is_dropped(url: str) -> None:
    """The whole of it would take minutes."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/rollouts",
            json={"token_ids": DOCUMENT, "starts": [40] * 100, "num_rollouts": 128, "max_suffix_tokens": 200},
            headers=HEADERS,
            timeout=1.0,
        )
    assert ask(url, num_rollouts=1).status_code == 200

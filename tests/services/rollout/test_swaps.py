"""New weights while the service answers: swaps, refusals, catching up. Real store, engine, server and database."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from services.engine.base import Generation, Prompt, Sampling
from services.engine.hf.engine import TransformersEngine
from services.rollout.app import build_app
from shared.api import RolloutResponse
from shared.engine_settings import EngineSettings
from shared.weights.store import FULL_FILE, WeightStore
from tests.services.rollout.conftest import HEADERS, SECRETS, counted, events_of, make_settings
from tests.services.serving import running, wait_until

BODY = {"token_ids": list(range(20, 60)), "starts": [16, 40], "num_rollouts": 2, "max_suffix_tokens": 32}


@contextmanager
def service(
    model: Path, folder: Path, *, engine: TransformersEngine | None = None
) -> Iterator[tuple[str, WeightStore]]:
    settings = make_settings(model, folder)
    with running(build_app(settings, SECRETS, engine=engine)) as url:
        yield url, WeightStore(settings.weight_store_url)


def ask(url: str, seed: int = 0) -> RolloutResponse:
    answer = httpx.post(f"{url}/v1/rollouts", json=BODY | {"seed": seed}, headers=HEADERS, timeout=30)
    assert answer.status_code == 200, answer.text
    return RolloutResponse.model_validate_json(answer.content)


def status(url: str) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{url}/status", headers=HEADERS, timeout=5).json()
    return found


def wait_for(url: str, version: int) -> None:
    wait_until(lambda: status(url)["weight_version"] == version, what=f"version {version}")


def refusal(url: str, version: int) -> str:
    """What the service says once it has refused the version."""
    wait_until(lambda: f"version {version} was refused" in str(status(url)["detail"]), what="the refusal")
    return str(status(url)["detail"])


def versions(answer: RolloutResponse) -> set[int]:
    return {rollout.weight_version for of_start in answer.rollouts for rollout in of_start}


def test_a_published_version_is_served(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        before = ask(url)
        store.publish({FULL_FILE: other_weights}, version=3, step=3)
        wait_for(url, 3)
        after = ask(url)
        assert (versions(before), versions(after)) == ({0}, {3})
        assert before.rollouts[0][0].token_ids != after.rollouts[0][0].token_ids


class BusyEngine(TransformersEngine):
    """Takes version 2 only while requests are being answered."""

    def __init__(self, model: Path) -> None:
        super().__init__(EngineSettings(model=str(model), device="cpu"))
        self.num_running = self.num_at_swap = 0
        """Requests that are being answered: now, and when version 2 came."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.num_running += 1
        try:
            return await super().generate(prompts, sampling)
        finally:
            self.num_running -= 1

    async def load_weights(self, folder: Path, version: int) -> None:
        while version == 2 and self.num_running < 4:  # noqa: ASYNC110 (a test's requests tell nobody)
            await asyncio.sleep(0.001)
        self.num_at_swap = self.num_running
        await super().load_weights(folder, version)


def test_a_swap_loses_no_request_in_flight(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    engine = BusyEngine(tiny_model)

    def ask_until_swapped(seed: int) -> list[RolloutResponse]:
        answers = [ask(url, seed)]
        while versions(answers[-1]) != {2}:
            answers.append(ask(url, seed))
        return answers

    with service(tiny_model, tmp_path, engine=engine) as (url, store), ThreadPoolExecutor(8) as pool:
        store.publish({FULL_FILE: (tiny_model / FULL_FILE).read_bytes()}, version=1, step=1)
        wait_for(url, 1)
        expected = {(1, seed): ask(url, seed) for seed in range(2)}
        asking = {pool.submit(ask_until_swapped, seed % 2): seed % 2 for seed in range(8)}
        store.publish({FULL_FILE: other_weights}, version=2, step=2)
        answers = [(seed, answer) for future, seed in asking.items() for answer in future.result(60)]
        expected |= {(2, seed): ask(url, seed) for seed in range(2)}
    assert engine.num_at_swap >= 4
    for seed, answer in answers:
        (version,) = versions(answer)
        assert answer == expected[version, seed]


def with_norm(change: Callable[[Tensor], Tensor | None]) -> Callable[[bytes], bytes]:
    """The file with one of its tensors changed, or left out."""

    def spoil(content: bytes) -> bytes:
        tensors = load(content)
        changed = change(tensors.pop("model.norm.weight"))
        return save(tensors if changed is None else tensors | {"model.norm.weight": changed})

    return spoil


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "shape (5,)": with_norm(lambda norm: norm[:5].clone()),
    "missing": with_norm(lambda norm: None),
    "NaN": with_norm(lambda norm: norm.index_fill(0, torch.tensor([0]), float("nan"))),
    "not a readable safetensors": lambda content: content[:1000],
}


@pytest.mark.parametrize("words", SPOILED)
def test_weights_that_do_not_fit_are_refused(
    tiny_model: Path, other_weights: bytes, tmp_path: Path, words: str
) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        before = ask(url)
        store.publish({FULL_FILE: SPOILED[words](other_weights)}, version=1, step=1)
        assert words in refusal(url, 1)
        assert status(url)["ready"]
        assert ask(url) == before


def test_a_corrupt_file_keeps_the_last_good_version_until_a_newer_one(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        store.publish({FULL_FILE: other_weights}, version=1, step=1)
        wait_for(url, 1)
        refused, good = counted("refused_weights"), ask(url)
        publish_corrupt(store, other_weights, version=2)
        assert "corrupt" in refusal(url, 2)
        assert ask(url) == good
        assert counted("refused_weights") == refused + 1
        store.publish({FULL_FILE: other_weights}, version=3, step=3)
        wait_for(url, 3)
        assert status(url)["detail"] == ""
    assert events_of(tmp_path) == [("refused_weights", 2)]


def publish_corrupt(store: WeightStore, content: bytes, *, version: int) -> None:
    """A version whose file has one flipped byte. Damaged elsewhere and moved, so that nobody sees it undamaged."""
    elsewhere = WeightStore(f"{store.root}-elsewhere")
    elsewhere.publish({FULL_FILE: content}, version=version, step=version)
    folder = Path(elsewhere.root) / f"v{version:08d}"
    (folder / FULL_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    folder.rename(Path(store.root) / folder.name)


def test_a_new_replica_catches_up_before_it_is_ready(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    store = WeightStore(make_settings(tiny_model, tmp_path).weight_store_url)
    store.publish({FULL_FILE: other_weights}, version=7, step=7)
    with service(tiny_model, tmp_path) as (url, _):
        assert status(url)["weight_version"] == 7
        assert versions(ask(url)) == {7}


def test_a_new_replica_goes_back_to_the_newest_good_version(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    store = WeightStore(make_settings(tiny_model, tmp_path).weight_store_url)
    store.publish({FULL_FILE: other_weights}, version=7, step=7)
    publish_corrupt(store, other_weights, version=8)
    with service(tiny_model, tmp_path) as (url, _):
        assert status(url)["weight_version"] == 7
        assert "corrupt" in refusal(url, 8)

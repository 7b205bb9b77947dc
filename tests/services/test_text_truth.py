"""What is judged is what is trained: whole windows through the real collector, rollout service and rewriter, with a
judge that remembers what it was shown. Every candidate's ids, decoded after those of its prefix, say what was shown.

Here the tokenizer decodes whole sequences; the code under test decodes stretches.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from transformers import AutoTokenizer

from services.collector.clients import build_services, http_client
from services.collector.collect import DroppedWindow, collect
from services.collector.sources.base import Document
from services.collector.windows import PolicyTokenizer, Window, WindowMaker
from services.engine.base import Engine, Generation, Prompt, Sampling, TokenScore
from services.engine.local import LocalEngine, LocalModel
from services.rewriter import app as rewriter
from services.rollout import app as rollout
from services.tokenizer import load_tokenizer
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.records import ScoredWindow
from shared.settings import ScheduleStage, Secrets, Settings
from tests.services.collector.stub_services import StubServices
from tests.services.fakes import FakeEngine
from tests.services.subject_tokenizers import BOS, EOS, MOON, SPECIALS, TEXTS, TOKENIZERS, save_policy

NUM_ROLLOUTS = 6
SIZES = {"context_tokens": 96, "suffix_tokens": 13, "min_prefix_tokens": 5, "min_suffix_tokens": 3}


@pytest.fixture(scope="module", params=TOKENIZERS)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(TOKENIZERS[request.param](), tmp_path_factory.mktemp("policy"))


class Sampler(LocalEngine):
    """A policy that samples anything: ids at random, cut pieces of texts, control tokens anywhere."""

    weight_version = 0
    can_constrain = False

    def __init__(self, folder: Path) -> None:
        super().__init__(EngineSettings(model=str(folder)), name="sampler")
        self._size = len(load_tokenizer(str(folder), setting="policy.model"))
        self._model = LocalModel(None, self._size, 256, frozenset({2}))

    async def start(self) -> None:
        await self._load_tokenizer()

    async def close(self) -> None: ...
    async def load_weights(self, folder: Path, version: int) -> None: ...

    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = ""
    ) -> tuple[list[list[TokenScore]], int]:
        raise NotImplementedError

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        return [
            [self._sample(tuple(prompt), sampling, row, index) for index in range(sampling.num_samples)]
            for row, prompt in enumerate(prompts)
            if not isinstance(prompt, str)
        ]

    def _sample(self, prompt: tuple[int, ...], sampling: Sampling, row: int, index: int) -> Generation:
        draw = random.Random(f"{sampling.seed + row} {index}")
        if index == 0:
            ids = [draw.randrange(self._size) for _ in range(draw.randint(1, 20))]
        else:
            text = self.encode(draw.choice(list(TEXTS.values())))
            first = draw.randrange(len(text))
            ids = text[first : first + draw.randint(1, 20)] + [2] * (index % 3 == 0)
        ids = ids[: sampling.bound(row)]
        ended: Literal["length", "stop"] = "stop" if ids[-1] == 2 else "length"
        return self._generation(prompt, tuple(ids), ended, 0)


def teach(prompt: str, index: int) -> str:
    """A copy, a repair, or broken text, by the suffix."""
    suffix = prompt.partition("\x1e")[2].partition("\x1e")[0]
    repair, broken = f"{suffix[: len(suffix) // 2]} 犬 é👩‍👩‍👧 moon", f"{suffix[:2]}\ufffd\ufffd"
    return (suffix, suffix, repair, broken)[len(suffix) % 4]


@dataclass
class Routed(httpx.AsyncBaseTransport):
    apps: dict[str, httpx.ASGITransport] = field(default_factory=dict)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self.apps[request.url.host].handle_async_request(request)


@contextlib.asynccontextmanager
async def serving(settings: Settings, policy_engine: Engine | None, judge: StubServices) -> AsyncIterator[Routed]:
    apps: dict[str, FastAPI] = {
        "rollout": rollout.build_app(settings, Secrets(), engine=policy_engine),
        "rewriter": rewriter.build_app(settings, Secrets(), engine=FakeEngine(answer=teach)),
    }
    routed = Routed({role: httpx.ASGITransport(app) for role, app in apps.items()})
    routed.apps["judge"] = httpx.ASGITransport(judge.app)
    async with contextlib.AsyncExitStack() as stack:
        for role, app in apps.items():
            await stack.enter_async_context(app.router.lifespan_context(app))
            await _until_ready(routed, role)
        yield routed


async def _until_ready(routed: Routed, role: str) -> None:
    async with httpx.AsyncClient(transport=routed) as client:
        for _ in range(1500):
            if (await client.get(f"http://{role}/readyz")).status_code == 200:
                return
            await asyncio.sleep(0.02)
    raise AssertionError(f"{role} was not ready after 30 s")


def make_settings(policy: Path, folder: Path, *, overlap: int) -> Settings:
    prompt = folder / "prompt.txt"
    prompt.write_text("{prefix}\x1e{suffix}\x1e")
    sections: dict[str, Any] = {
        "run": {"name": "truth", "directory": str(folder)},
        "policy": {"model": str(policy)},
        "chunks": SIZES | {"window_overlap_tokens": overlap},
        "rollout": {"url": "http://rollout", "poll_interval_s": 5, "engine": {"device": "cpu"}},
        "rewriter": {"url": "http://rewriter", "prompt": str(prompt)},
        "judge": {"url": "http://judge"},
    }
    return Settings.model_validate(sections)


@dataclass
class Seen:
    window: Window
    document: ScoredWindow
    judged: Any


def run(settings: Settings, engine: Engine | None, documents: Sequence[Document]) -> list[Seen]:
    judge = StubServices()
    tokenizer = PolicyTokenizer(settings.policy.tokenizer_source)
    maker = WindowMaker(tokenizer, settings.chunks, seed=0)
    stage = ScheduleStage(kinds=("original", "rewrite", "rollout"), num_rollouts=NUM_ROLLOUTS)

    async def work() -> list[Seen]:
        found = []
        async with (
            serving(settings, engine, judge) as routed,
            http_client(settings, token="", transport=routed) as http,
        ):
            services = build_services(settings, http)
            for document in documents:
                for window in maker.windows(document, part=0, epoch=0):
                    text = tokenizer.show(window.token_ids, window.chunks)
                    scored = await collect(window, text, stage=stage, services=services, settings=settings)
                    assert not isinstance(scored, DroppedWindow), scored
                    found.append(Seen(window, scored, judge.bodies("/v1/judgements")[-1]))
        return found

    return asyncio.run(work())


class Truth:
    """Decodes whole sequences, and hides nothing but BOS, and an end-of-text at the very end."""

    def __init__(self, policy: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(policy)
        self.bos, self.eos = SPECIALS.index(BOS), SPECIALS.index(EOS)

    def decode(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        ids = ids[1:] if ids[:1] == [self.bos] else ids
        ids = ids[:-1] if ids[-1:] == [self.eos] else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def says(self, token_ids: Sequence[int], text: str) -> bool:
        """Up to one character that is cut at the end: at most three bytes, each of them part of one token."""
        return self.decode(token_ids) == text or any(
            self.decode(token_ids[: len(token_ids) - cut]) in (text, f"{text}\ufffd") for cut in range(4)
        )


def shown(judged: Any) -> list[tuple[str, list[str]]]:
    """Of each chunk its prefix and the texts of its candidates."""
    return [(judged["text"][: item["start"]], [one["text"] for one in item["candidates"]]) for item in judged["items"]]


def check(seen: Seen, truth: Truth) -> Counter[str]:
    """That all of one window is true; the kinds of its candidates."""
    kinds: Counter[str] = Counter()
    ends = {chunk.start: chunk.end for chunk in seen.window.chunks}
    for chunk, (prefix, texts) in zip(seen.document.chunks, shown(seen.judged), strict=True):
        before = seen.document.token_ids[: chunk.start]
        assert truth.decode(before) == prefix
        assert [candidate.text for candidate in chunk.candidates] == texts
        for candidate, text in zip(chunk.candidates, texts, strict=True):
            assert truth.says(before + candidate.token_ids, prefix + text), (candidate.kinds, candidate.token_ids, text)
            assert not {truth.bos, truth.eos} & set(candidate.token_ids[:-1]), "a control token was shown as nothing"
            assert "\ufffd" not in prefix + text
            assert len(candidate.token_ids) <= ends[chunk.start] - chunk.start
            kinds.update(candidate.kinds)
    return kinds


def documents() -> list[Document]:
    return [Document(index, name, text) for index, (name, text) in enumerate(TEXTS.items())]


def absent() -> Counter[str]:
    (metric,) = metrics.candidates_absent_total.collect()
    samples = [(one.labels, int(one.value)) for one in metric.samples if one.name.endswith("_total")]
    return Counter({f"{labels['kind']} {labels['reason']}": count for labels, count in samples})


def test_what_the_judge_was_shown_is_what_the_ids_say(policy: Path, tmp_path: Path) -> None:
    truth, before = Truth(policy), absent()
    settings = make_settings(policy, tmp_path, overlap=11)
    found = run(settings, Sampler(policy), documents())
    kinds: Counter[str] = sum((check(seen, truth) for seen in found), Counter())
    assert min(kinds["original"], kinds["rewrite"], kinds["rollout"]) > 5, kinds
    refused = absent() - before
    assert refused["rollout control_token"] > 0
    assert refused["rewrite broken_text"] > 0
    num_asked = NUM_ROLLOUTS * sum(len(seen.window.chunks) for seen in found)
    assert kinds["rollout"] + sum(count for what, count in refused.items() if "rollout" in what) == num_asked


def test_a_real_models_rollouts_are_shown_as_they_are(policy: Path, tmp_path: Path) -> None:
    truth = Truth(policy)
    found = run(make_settings(policy, tmp_path, overlap=0), None, documents()[:2])
    kinds: Counter[str] = sum((check(seen, truth) for seen in found), Counter())
    assert kinds["original"] > 5


def test_a_copy_has_the_very_ids_of_its_original(policy: Path, tmp_path: Path) -> None:
    """Also where a document ends, with its end-of-text."""
    truth, copied, num_ends = Truth(policy), Counter[bool](), 0
    documents = [Document(number, "d", MOON * (10 + number)) for number in range(4)]
    for seen in run(make_settings(policy, tmp_path, overlap=0), Sampler(policy), documents):
        for chunk in seen.document.chunks:
            original = next(found for found in chunk.candidates if "original" in found.kinds)
            num_ends += original.token_ids[-1] == truth.eos
            copied.update(
                found.token_ids == original.token_ids
                for found in chunk.candidates
                if "rewrite" in found.kinds and found.text == original.text
            )
    assert num_ends > 1
    assert copied[True] > 3
    assert copied[False] <= copied[True] // 4, "only where a border lies inside what a text is cut into at first"

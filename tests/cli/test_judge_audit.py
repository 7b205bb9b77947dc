"""Measuring a judge: one over real HTTP, and the real service in this process."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cli.judge_audit import AuditReport, audit_judge, make_tasks
from cli.main import main
from services.collector.windows import PolicyTokenizer
from services.engine.base import Engine
from services.known_pairs import SPOILINGS
from shared.errors import HeadwaterError, SettingsError
from shared.settings import Secrets, Settings
from tests.cli.told_judges import ToldJudge, is_original
from tests.services.collector.conftest import build_tokenizer
from tests.services.collector.processes import served
from tests.services.fakes import FakeEngine

SENTENCES = (
    "In {n}, Ada Lovelace met Charles Babbage and Mary Somerville in the house of a friend. ",
    "The bridge of stone is {n} feet long and leads over the river to Bath. ",
    "Nobody knows why the old mill of Kent was left to the wind and to the rain. ",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("policy"), adds_bos=True)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    texts = ("".join(SENTENCES[(n + k) % 3].format(n=17 * n + 31 * k + 100) for k in range(8)) for n in range(12))
    path.write_text("\n".join(["no json", *(json.dumps({"text": text}) for text in texts)]), encoding="utf-8")
    return path


CHUNKS = {"context_tokens": 600, "suffix_tokens": 120, "min_prefix_tokens": 40, "min_suffix_tokens": 60}


def settings_of(policy: Path, url: str = "", **judge: Any) -> Settings:
    sections = {"policy": {"model": str(policy)}, "chunks": CHUNKS, "judge": judge | {"url": url}}
    return Settings.model_validate(sections)


def audited(settings: Settings, documents: Path, *, num_pairs: int = 12, engine: Engine | None = None) -> AuditReport:
    about = {"documents": str(documents), "num_pairs": num_pairs, "timeout_s": 20.0}
    return asyncio.run(audit_judge(settings, Secrets(), engine=engine, **about))  # type: ignore[arg-type]


def told(judge: ToldJudge, policy: Path, documents: Path, *names: str, num_pairs: int = 12) -> AuditReport:
    with served(judge.app) as url:
        return audited(settings_of(policy, url, criteria={name: {} for name in names}), documents, num_pairs=num_pairs)


def test_pairs_are_the_runs_chunks_with_every_kind_of_spoiling(policy: Path, documents: Path) -> None:
    tokenizer = PolicyTokenizer(str(policy))
    tasks = make_tasks(settings_of(policy), tokenizer, documents=str(documents), num_pairs=24)
    assert {kind: number >= 3 for kind, number in Counter(task.spoiling for task in tasks).items()} == dict.fromkeys(
        SPOILINGS, True
    )
    assert len({task.question.text for task in tasks[:12]}) == 12, "one of each window comes first"
    for task in tasks:
        question = task.question
        assert question.better == question.text[question.start : question.end] != question.worse
        assert len(tokenizer.encode(question.text[: question.start])) >= 39
    assert {task.question.better_first for task in tasks} == {True, False}


def test_a_perfect_and_a_blind_criterion(policy: Path, documents: Path) -> None:
    judge = ToldJudge(
        pairwise={"quality": lambda a, b, original: float(a == original), "coherence": lambda a, b, original: 1.0},
        pointwise={"safety": lambda prefix, text, original: 1.0},
    )
    report = told(judge, policy, documents, "quality", "coherence", "safety")
    quality, coherence, safety, reward = report.criteria
    assert (quality.accuracy.mean, quality.share_of_first, quality.consistency.mean) == (1.0, 0.5, 1.0)
    assert (coherence.accuracy.mean, coherence.share_of_first, coherence.consistency.mean) == (0.5, 1.0, 0.0)
    assert (safety.accuracy.mean, safety.share_of_first, safety.ties.mean) == (0.5, None, 1.0)
    assert (reward.name, reward.accuracy.mean, reward.accuracy.number) == ("reward", 1.0, 12)
    assert [figures.num_calls for figures in report.criteria] == [24, 24, 24, 72]
    assert [len(request.criteria) for request in judge.requests] == [1] * 36 + [0] * 12
    assert report.is_above(0.7)
    assert not report.is_above(0.9), "12 of 12 has a low end of 0.76"


def test_a_missing_order_is_asked_for_with_other_seeds(policy: Path, documents: Path) -> None:
    one_order = ToldJudge(
        pairwise={"quality": lambda a, b, original: float(a == original)},
        orders=lambda request: [(0, 1)] if request.seed % 2 else [(1, 0)],
    )
    report = told(one_order, policy, documents, "quality")
    seeds = [request.seed for request in one_order.requests]
    assert len(seeds) == len(set(seeds)) > 12
    assert report.criteria[0].consistency.number >= 11, "six requests show both orders in 31 of 32 cases"
    never = ToldJudge(pairwise=one_order.pairwise, orders=lambda request: [(0, 1)])
    report = told(never, policy, documents, "quality", num_pairs=4)
    assert len(never.requests) == 24, "at most six requests a pair"
    assert report.criteria[0].accuracy.mean == 1.0


def test_verdicts_that_are_missing_are_counted_and_no_score(policy: Path, documents: Path) -> None:
    judge = ToldJudge(
        pairwise={"quality": lambda a, b, original: 1.0 if a == original else None},
        pointwise={"safety": is_original},
        fails=lambda request: "refused" if request.criteria == ("safety",) else "",
    )
    quality, safety, _ = told(judge, policy, documents, "quality", "safety").criteria
    assert quality.unreadable == {"no_verdict": 12}
    assert (quality.accuracy.mean, quality.consistency.number) == (1.0, 0)
    assert (safety.unreadable, safety.accuracy.number, safety.num_calls) == ({"refused": 12}, 0, 24)


def test_a_judge_without_any_verdict_is_an_error(policy: Path, documents: Path) -> None:
    mute = ToldJudge(pointwise={"quality": is_original}, fails=lambda request: "unreadable_verdict")
    with pytest.raises(HeadwaterError, match="no verdict on any of 12 pairs"):
        told(mute, policy, documents, "quality")


def test_a_judge_of_tokens_gets_them(policy: Path, documents: Path) -> None:
    judge = ToldJudge(pointwise={"likelihood": is_original}, wants_token_ids=True)
    assert told(judge, policy, documents, "likelihood", num_pairs=3).criteria[0].accuracy.mean == 1.0
    tokenizer = PolicyTokenizer(str(policy))
    for request in judge.requests:
        (item,) = request.items
        assert item.token_start is not None
        assert tokenizer.decode(request.token_ids[1 : item.token_start]) == request.text[: item.start]
        assert request.token_ids[:1] == tokenizer.opening
        assert [tokenizer.decode(one.token_ids) for one in item.candidates] == [one.text for one in item.candidates]


def knows_the_reference(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [float(candidate == reference) for candidate in candidates]


def test_the_real_service_is_measured_in_this_process(policy: Path, documents: Path) -> None:
    criteria = {"python": {"function": f"{__name__}:knows_the_reference"}}
    (python,) = audited(settings_of(policy, criteria=criteria), documents).criteria
    assert (python.name, python.accuracy.mean, python.accuracy.number) == ("python", 1.0, 12)


def test_a_model_that_always_says_a_is_seen_in_the_real_service(policy: Path, documents: Path) -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: A")
    (quality,) = audited(settings_of(policy), documents, num_pairs=4, engine=engine).criteria
    assert (quality.accuracy.mean, quality.ties.mean) == (0.5, 1.0)
    assert quality.share_of_first == 1.0
    assert quality.num_calls > 0


def test_an_engine_that_can_not_start_is_the_error(policy: Path, documents: Path) -> None:
    class Broken(FakeEngine):
        async def start(self) -> None:
            raise SettingsError("no such model folder")

    with pytest.raises(SettingsError, match="no such model folder"):
        audited(settings_of(policy), documents, engine=Broken())


def test_a_judge_that_is_away_is_waited_for_no_longer_than_said(policy: Path, documents: Path) -> None:
    settings = settings_of(policy, "http://127.0.0.1:9")
    with pytest.raises(HeadwaterError, match=r"is not ready after 0\.2 s \(--timeout\)"):
        asyncio.run(audit_judge(settings, Secrets(), documents=str(documents), num_pairs=2, timeout_s=0.2))


def test_short_documents_are_refused(policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "too short"}\n', encoding="utf-8")
    with pytest.raises(HeadwaterError, match="no chunk that could be spoiled"):
        audited(settings_of(policy), path)


@pytest.mark.parametrize(("knows", "code"), [(True, 0), (False, 1)])
def test_the_command_prints_a_table_writes_json_and_answers_by_exit_code(
    policy: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], knows: bool, code: int
) -> None:
    judge = ToldJudge(pointwise={"quality": is_original if knows else lambda prefix, text, original: 0.5})
    config, figures = tmp_path / "judge.toml", tmp_path / "figures.json"
    with served(judge.app) as url:
        config.write_text(tomli_w.dumps({"policy": {"model": str(policy)}, "chunks": CHUNKS, "judge": {"url": url}}))
        words = ["judge-audit", str(config), "--documents", str(documents), "--pairs", "12", "--json", str(figures)]
        assert main(words) == code
    printed, data = capsys.readouterr().out, json.loads(figures.read_text())
    assert "judge told (told)" in printed
    assert "  garbled" in printed
    assert ("NOT surely above 0.5" in printed) == (not knows)
    assert (data["holds"], data["decided_by"], data["criteria"]["quality"]["accuracy"]["value"]) == (
        knows,
        "quality",
        1.0 if knows else 0.5,
    )

"""The whole collector against real HTTP, Redis and SQLite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.responses import JSONResponse, Response
from transformers import AutoTokenizer

from shared import metrics
from shared.database import CandidateRow, ChunkRow, WindowRow, transaction
from shared.errors import SettingsError, SourceError
from shared.records import ScoredWindow
from shared.settings import Secrets, Settings
from tests.services.collector.processes import served
from tests.services.collector.runs import SENTENCE, Seen, collect_all, write_documents
from tests.services.collector.stub_services import StubServices, instead, judgement

MakeSettings = Callable[..., Settings]
Collect = Callable[..., tuple[Seen, list[ScoredWindow]]]
EMPTY = {"text": "", "token_ids": [], "finish_reason": "stop"}
UNREADABLE = {"reason": "unreadable_verdict", "num_calls": 4, "num_failures": 4}


@pytest.fixture
def documents(tmp_path: Path) -> dict[str, Any]:
    return {"path": str(write_documents(tmp_path / "documents.jsonl", 4))}


@pytest.fixture
def collect(make_settings: MakeSettings, documents: dict[str, Any]) -> Collect:
    """`collect(stub, documents={...}, collector={...})`: what a whole run leaves behind."""

    def run(stub: StubServices | None = None, **sections: Any) -> tuple[Seen, list[ScoredWindow]]:
        sections["documents"] = documents | sections.get("documents", {})
        with served((stub or StubServices()).app) as url:
            seen = collect_all(make_settings(url, **sections), Secrets(token="word"))
        return seen, seen.take_all()

    return run


def kinds(document: ScoredWindow) -> set[tuple[str, ...]]:
    return {tuple(kind for candidate in chunk.candidates for kind in candidate.kinds) for chunk in document.chunks}


def reasons(seen: Seen) -> list[tuple[str, str]]:
    with transaction(seen.run.database) as session:
        rows = session.scalars(sa.select(WindowRow).where(WindowRow.state == "dropped"))
        return [(row.reason, row.detail) for row in rows]


def test_every_document_reaches_the_stream_with_all_its_candidates(collect: Collect, tmp_path: Path) -> None:
    seen, found = collect(stub := StubServices())
    assert sorted(document.source_id for document in found) == ["d0", "d1", "d2", "d3"]
    for document in found:
        assert kinds(document) == {("original", "rewrite", "rollout", "rollout")}
        assert {chunk.judgement.rewards for chunk in document.chunks if chunk.judgement} == {(1.0, 0.75, 0.5, 0.25)}
        assert set(document.seconds) == {"rollout", "rewrite", "judge"}
    assert seen.balance.scored == 4
    assert seen.contradictions == []
    assert {headers["authorization"] for headers in stub.headers} == {"Bearer word"}


def test_the_text_of_every_candidate_is_what_its_ids_decode_to(collect: Collect, tokenizer_folder: Path) -> None:
    """Behind its prefix, in which the judge reads it and the trainer trains it. A last end-of-text has no text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    _, found = collect()
    for document in found:
        for chunk in document.chunks:
            prefix = list(document.token_ids[: chunk.start])
            shown = str(tokenizer.decode(prefix))
            for candidate in chunk.candidates:
                says = tokenizer.decode([*prefix, *candidate.token_ids], skip_special_tokens=True)
                assert says == shown + candidate.text
    assert sum(len(chunk.candidates) for document in found for chunk in document.chunks) > 20


def test_services_are_asked_for_what_the_window_holds(collect: Collect) -> None:
    stub = StubServices()
    _, (document, *_) = collect(stub)
    rollout = next(b for b in stub.bodies("/v1/rollouts") if tuple(b["token_ids"]) == document.token_ids)
    assert rollout["starts"] == [chunk.start for chunk in document.chunks]
    lengths = [len(chunk.candidates[0].token_ids) for chunk in document.chunks]
    assert (rollout["num_rollouts"], rollout["max_suffix_tokens"], rollout["temperature"]) == (2, lengths, 1.0)
    assert document.token_ids[-1] == 1, "the end-of-text, in the last chunk"
    rewrite = next(b for b in stub.bodies("/v1/rewrites") if b["text"].startswith(f"{document.source_id[1:]}: The"))
    assert [item["max_suffix_tokens"] for item in rewrite["items"]] == lengths
    assert [item["ends_document"] for item in rewrite["items"]] == [False] * (len(lengths) - 1) + [True]
    original = document.chunks[0].candidates[0]
    name = f"{document.source_id[1:]}: "  # its text begins with it
    judged = next(body for body in stub.bodies("/v1/judgements") if body["text"].startswith(name))
    item = judged["items"][0]
    assert judged["text"][item["start"] : item["end"]] == original.text
    assert {key for candidate in item["candidates"] for key in candidate} == {"text"}, "the judge learns no kinds"


def test_the_same_run_asks_with_the_same_seeds(collect: Collect) -> None:
    first, second = StubServices(), StubServices()
    collect(first, run={"name": "first"})
    collect(second, run={"name": "second"})
    for path in ("/v1/rollouts", "/v1/rewrites", "/v1/judgements"):
        seeds = sorted(body["seed"] for body in first.bodies(path))
        assert seeds == sorted(body["seed"] for body in second.bodies(path))
        assert len(set(seeds)) == 4


def test_a_verdict_that_failed_drops_its_chunk_and_is_no_score(collect: Collect) -> None:
    def fail_first_chunk(body: Any) -> dict[str, Any]:
        return {"judgements": [UNREADABLE, *(judgement(len(item["candidates"])) for item in body["items"][1:])]}

    _, found = collect(StubServices(instead("/v1/judgements", fail_first_chunk)))
    assert len(found) == 4
    for document in found:
        assert [(chunk.start, chunk.reason) for chunk in document.dropped_chunks] == [(8, "unreadable_verdict")]
        assert 8 not in {chunk.start for chunk in document.chunks}


def test_a_window_without_any_scored_chunk_is_dropped(collect: Collect) -> None:
    def fail(body: Any) -> dict[str, Any]:
        return {"judgements": [UNREADABLE] * len(body["items"])}

    seen, found = collect(StubServices(instead("/v1/judgements", fail, first_only=True)))
    assert len(found) == 3
    assert seen.balance.dropped == {"no_scored_chunks": 1}
    assert "unreadable_verdict" in reasons(seen)[0][1]


def test_refused_and_empty_rewrites_are_absent_and_counted(collect: Collect) -> None:
    def refuse(body: Any) -> dict[str, Any]:
        return {"rewrites": [[EMPTY | {"refusal": "refused"}], *[[EMPTY]] * (len(body["items"]) - 1)]}

    before = metrics.candidates_absent_total.labels("rewrite", "refused")._value.get()
    _, found = collect(StubServices(instead("/v1/rewrites", refuse)))
    assert {kind for document in found for kind in kinds(document)} == {("original", "rollout", "rollout")}
    assert metrics.candidates_absent_total.labels("rewrite", "refused")._value.get() == before + 4


def test_a_chunk_with_one_candidate_is_not_shown_to_the_judge(collect: Collect) -> None:
    def refuse_first(body: Any) -> dict[str, Any]:
        return {"rewrites": [[EMPTY], *[[EMPTY | {"text": "x", "token_ids": [5]}]] * (len(body["items"]) - 1)]}

    schedule = [{"kinds": ["original", "rewrite"], "num_rollouts": 0}]
    stub = StubServices(instead("/v1/rewrites", refuse_first))
    _, found = collect(stub, collector={"schedule": schedule})
    assert {(lost.start, lost.reason) for document in found for lost in document.dropped_chunks} == {
        (8, "too_few_candidates")
    }
    assert stub.bodies("/v1/rollouts") == []


def test_a_window_of_equal_candidates_is_no_preference_and_never_judged(collect: Collect) -> None:
    copy = {"text": "x", "token_ids": [5], "finish_reason": "length"}

    def copies(path: str, body: Any) -> Response | None:
        if path == "/v1/rollouts":
            return JSONResponse({"rollouts": [[copy | {"weight_version": 3}] * 2 for _ in body["starts"]]})
        if path == "/v1/rewrites" and len(stub.bodies(path)) == 1:
            return JSONResponse({"rewrites": [[copy] for _ in body["items"]]})
        return None

    stub = StubServices(copies)
    schedule = [{"kinds": ["rewrite", "rollout"], "num_rollouts": 2}]
    seen, found = collect(stub, collector={"schedule": schedule})
    assert (len(found), len(stub.bodies("/v1/judgements"))) == (3, 3)
    assert seen.balance.dropped == {"no_preference": 1}
    assert {kind for document in found for kind in kinds(document)} == {("rewrite", "rollout", "rollout")}


def test_objectives_without_judge_never_ask_it(collect: Collect) -> None:
    stub = StubServices()
    schedule = [{"kinds": ["original"], "num_rollouts": 0}]
    _, found = collect(stub, trainer={"objective": "next_token"}, collector={"schedule": schedule})
    assert stub.requests == []
    assert len(found) == 4
    assert {kind for document in found for kind in kinds(document)} == {("original",)}
    assert all(chunk.judgement is None for document in found for chunk in document.chunks)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/v1/rollouts", "rollout_refused"), ("/v1/rewrites", "rewrite_refused"), ("/v1/judgements", "judge_refused")],
)
def test_a_refused_request_drops_its_window_with_the_services_words(collect: Collect, path: str, reason: str) -> None:
    def refuse(body: Any) -> Response:
        return JSONResponse({"error": {"type": "RequestError", "message": "too long for me"}}, status_code=422)

    seen, found = collect(StubServices(instead(path, refuse, first_only=True)))
    assert len(found) == 3
    assert seen.balance.dropped == {reason: 1}
    assert "too long for me" in reasons(seen)[0][1]


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_of_another_shape_is_waited_out(collect: Collect, count: int) -> None:
    """As of a judge of another version behind the same address."""

    def wrong(body: Any) -> dict[str, Any]:
        return {"judgements": [judgement(count) for _ in body["items"]]}

    def interfere(path: str, body: Any) -> Response | None:
        return JSONResponse(wrong(body)) if 1 < len(stub.bodies("/v1/judgements")) < 8 else None

    stub = StubServices(interfere)
    seen, found = collect(stub, collector={"max_windows_in_flight": 1})
    assert (len(found), seen.balance.dropped) == (4, {})
    with pytest.raises(SettingsError, match=f"judge at .* answered {count} rewards, expected 4; is judge.url right"):
        collect(StubServices(instead("/v1/judgements", wrong)), run={"name": "another"})


def test_a_wrong_token_stops_the_collector(collect: Collect) -> None:
    stub = StubServices(lambda path, body: JSONResponse({"error": {"message": "no"}}, status_code=401))
    with pytest.raises(SettingsError, match="set HEADWATER_TOKEN"):
        collect(stub)


def test_bad_lines_are_dropped_with_file_and_line_and_the_run_goes_on(
    collect: Collect, documents: dict[str, Any]
) -> None:
    path = Path(documents["path"])
    content = path.read_bytes()
    path.write_bytes(b'{broken\n{"id": 3}\n{"text": "tiny"}\n{"text": "\xff"}\n' + content)
    seen, found = collect()
    assert len(found) == 4
    assert seen.balance.dropped == {"not_json": 1, "no_text_field": 1, "too_short": 1, "invalid_utf8": 1}
    assert seen.balance.read == 8
    assert seen.contradictions == []
    details = dict(reasons(seen))
    assert details["not_json"].startswith(f"{path}:1: not JSON")
    assert f"{path}:3" in details["too_short"]


def test_a_source_without_any_usable_document_is_an_error(collect: Collect, tmp_path: Path) -> None:
    path = tmp_path / "bodies.jsonl"
    path.write_text('{"body": "x"}\n' * 3)
    for max_epochs in (0, 1):
        with pytest.raises(SourceError, match=r"no usable document: \d+ read, dropped \{'no_text_field': \d+\}"):
            collect(documents={"path": str(path), "max_epochs": max_epochs})


def test_missing_files_are_an_error_that_names_the_glob(collect: Collect, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none-\*\.jsonl"):
        collect(documents={"path": str(tmp_path / "none-*.jsonl")})


def test_each_epoch_reads_everything_again_in_another_order(collect: Collect) -> None:
    seen, found = collect(documents={"max_epochs": 3})
    assert len(found) == 12
    by_epoch = [[d.source_id for d in found if d.key.epoch == epoch] for epoch in range(3)]
    assert all(sorted(names) == ["d0", "d1", "d2", "d3"] for names in by_epoch)
    assert seen.balance.scored == 12


def test_parts_and_windows_are_all_collected_once(collect: Collect, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE * 8)
    write_documents(tmp_path / "documents.jsonl", 7)
    options = {"path": str(tmp_path / "documents.jsonl"), "num_parts": 3, "shuffle_buffer": 2}
    _, found = collect(documents=options)
    assert sorted(document.source_id for document in found) == [f"d{index}" for index in range(7)]
    _, found = collect(documents={"path": str(tmp_path / "a.txt"), "format": "text"}, run={"name": "t"})
    assert [document.key.window for document in sorted(found, key=lambda d: d.key.window)] == list(range(len(found)))
    assert len(found) > 3


def test_a_share_of_windows_is_kept_for_people(collect: Collect) -> None:
    seen, found = collect(collector={"record_share": 1.0})
    with transaction(seen.run.database) as session:
        chunks = session.scalars(sa.select(ChunkRow)).all()
        assert len(chunks) == sum(len(document.chunks) for document in found)
        first = next(chunk for chunk in chunks if chunk.start == 8)
        candidates = session.scalars(sa.select(CandidateRow).where(CandidateRow.chunk_id == first.id)).all()
        assert [(row.kinds, row.reward) for row in candidates] == [
            ("original", 1.0), ("rewrite", 0.75), ("rollout", 0.5), ("rollout", 0.25),
        ]  # fmt: skip
        assert first.fingerprint == "stub"
        assert ": The " in first.prefix


def test_a_small_share_keeps_few_and_none_keeps_none(collect: Collect) -> None:
    seen, _ = collect(collector={"record_share": 0.0})
    with transaction(seen.run.database) as session:
        assert session.scalars(sa.select(ChunkRow)).all() == []

"""Recorded candidates put before another judge: a real database, a judge over real HTTP or in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cli.main import main
from shared.database import CandidateRow, ChunkRow, StepRow, transaction
from shared.recordings import read_recorded
from shared.records import Candidate, Judgement, Lease, ScoredChunk, ScoredWindow, WindowKey
from shared.runs import ShownText
from tests.cli.conftest import MadeRun
from tests.cli.told_judges import ToldJudge
from tests.services.collector.processes import served

TEXT = "Long ago. The moon is near. Mars is far."
FIRST, SECOND = (9, 27), (27, 40)  # " The moon is near." and " Mars is far."


def window(position: int, *, with_original: bool = True) -> ScoredWindow:
    """Two chunks; in each the run's judge prefers the rollout."""
    chunks = []
    for start, (begin, end) in ((4, FIRST), (8, SECOND)):
        original = Candidate(
            kinds=("original",) if with_original else ("rewrite",), token_ids=(1, start), text=TEXT[begin:end]
        )
        rollout = Candidate(kinds=("rollout",), token_ids=(2, start), text=f" roll {start}", weight_version=0)
        judgement = Judgement(rewards=(0.25, 0.75), scores={}, num_calls=6, fingerprint="old")
        chunks.append(ScoredChunk(start=start, candidates=(original, rollout), judgement=judgement))
    return ScoredWindow(
        run_id="made", key=WindowKey(part=0, epoch=0, position=position, window=0), source_id=f"d{position}",
        token_ids=tuple(range(1, 12)), chunks=tuple(chunks), read_at=1.0, scored_at=2.0, seconds={"judge": 3.0},
    )  # fmt: skip


SHOWN = ShownText(TEXT, {4: FIRST, 8: SECOND})


@pytest.fixture
def recorded(made: MadeRun) -> MadeRun:
    lease = Lease(0, "a", made.ledger.take_part(0, after=0))
    for position in range(3):
        made.run.record_chunks(window(position), ["p", "q"], lease, shown=SHOWN)
    return made


def compare(made: MadeRun, judge: ToldJudge, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    config, figures = tmp_path / "judge.toml", tmp_path / "figures.json"
    with served(judge.app) as url:
        config.write_text(f'[judge]\nurl = "{url}"\n')
        words = ["judge-compare", str(made.folder.path), str(config), "--json", str(figures), *options]
        code = main(words)
    return code, json.loads(figures.read_text()) if figures.exists() else {}


def likes_originals(prefix: str, text: str, original: str) -> float:
    return 0.9 if text == original else 0.2


def likes_rollouts(prefix: str, text: str, original: str) -> float:
    return float("roll" in text)


def test_the_other_judge_is_asked_what_the_runs_judge_was_asked(recorded: MadeRun, tmp_path: Path) -> None:
    judge = ToldJudge(pointwise={"quality": likes_originals})
    assert compare(recorded, judge, tmp_path)[0] == 0
    asked = {
        (r.text[: i.start], r.text[i.start : i.end], *(c.text for c in i.candidates))
        for r in judge.requests
        for i in r.items
    }
    assert asked == {
        ("Long ago.", " The moon is near.", " The moon is near.", " roll 4"),
        ("Long ago. The moon is near.", " Mars is far.", " Mars is far.", " roll 8"),
    }
    assert len(judge.requests) == 6


def test_flips_are_counted_and_shown_with_their_texts(
    recorded: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = compare(recorded, ToldJudge(pointwise={"quality": likes_originals}), tmp_path, "--show", "1")
    printed = capsys.readouterr().out
    found = data["agreement"]
    assert (code, data["chunks"], data["fingerprints_then"], data["fingerprint"]) == (0, 6, {"old": 6}, "told")
    assert [found[name]["value"] for name in ("chosen", "rejected", "orders", "flipped")] == [0.0, 0.0, 0.0, 1.0]
    assert found["rank_correlation"] == -1.0
    assert (found["chosen_kinds"]["rollout"], found["chosen_kinds"]["original"]) == (
        {"then": 1.0, "now": 0.0},
        {"then": 0.0, "now": 1.0},
    )
    assert data["a_chunk"]["then"] == {"calls": 6.0, "seconds": 1.5}
    assert data["a_chunk"]["now"]["calls"] == 2.0
    assert len(data["flips"]) == 6
    assert data["flips"][0]["gap"] == pytest.approx(0.7)
    assert printed.count("chosen then  roll") == 1
    assert "judged by old, now by told (told)" in printed


def test_the_exit_code_follows_the_agreement(recorded: MadeRun, tmp_path: Path) -> None:
    opposed, alike = (ToldJudge(pointwise={"quality": score}) for score in (likes_originals, likes_rollouts))
    assert compare(recorded, opposed, tmp_path, "--at-least", "0.9")[0] == 1
    assert compare(recorded, alike, tmp_path, "--at-least", "0.9")[0] == 0


def test_nothing_of_the_run_is_changed(recorded: MadeRun, tmp_path: Path) -> None:
    def rows() -> list[Any]:
        with transaction(recorded.engine) as session:
            return [session.execute(sa.select(*t.__table__.columns)).all() for t in (ChunkRow, CandidateRow, StepRow)]

    before = rows()
    compare(recorded, ToldJudge(pointwise={"quality": likes_originals}), tmp_path)
    assert rows() == before


def test_chunks_that_could_not_be_judged_are_told_apart(
    recorded: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(request: Any) -> str:
        return "unreadable_verdict" if request.items[0].start == FIRST[0] else ""

    code, data = compare(recorded, ToldJudge(pointwise={"quality": likes_rollouts}, fails=fails), tmp_path)
    assert (code, data["failures"], data["agreement"]["chosen"]["number"]) == (0, {"unreadable_verdict": 3}, 3)
    assert "3 unreadable_verdict" in capsys.readouterr().out
    mute = ToldJudge(pointwise={"quality": likes_rollouts}, fails=lambda request: "refused")
    assert compare(recorded, mute, tmp_path)[0] == 1
    assert "the judge judged none of 6 chunks: {'refused': 6}" in capsys.readouterr().err


def test_a_run_without_recorded_chunks_says_what_to_set(
    made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(made, ToldJudge(pointwise={"quality": likes_rollouts}), tmp_path)[0] == 1
    assert "raise collector.record_share" in capsys.readouterr().err


def prefers_the_reference(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [float(candidate == reference) for candidate in candidates]


def test_the_real_service_is_asked_in_this_process(
    recorded: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "judge.toml"
    config.write_text(f'[judge.criteria.python]\nfunction = "{__name__}:prefers_the_reference"\n')
    assert main(["judge-compare", str(recorded.folder.path), str(config), "--show", "0"]) == 0
    assert "trained pairs that would flip  1.000" in capsys.readouterr().out


def test_rows_of_an_older_version_are_asked_with_the_prefix_that_was_kept(made: MadeRun) -> None:
    lease = Lease(0, "a", made.ledger.take_part(0, after=0))
    made.run.record_chunks(window(0), ["Long ago.", "moon is near."], lease)
    made.run.record_chunks(window(1, with_original=False), ["Long ago.", "moon is near."], lease)
    first, second, third, _ = read_recorded(made.engine, "made", limit=10)
    assert (first.text, first.original, first.has_window) == (
        "Long ago. The moon is near.",
        " The moon is near.",
        False,
    )
    assert (second.text[: second.text_start], second.original) == ("moon is near.", " Mars is far.")
    assert third.original == ""


def test_recorded_chunks_are_read_evenly_or_by_weight_version(recorded: MadeRun) -> None:
    every = read_recorded(recorded.engine, "made", limit=10)
    assert [chunk.window_id for chunk in every] == ["0.0.0.0"] * 2 + ["0.0.1.0"] * 2 + ["0.0.2.0"] * 2
    some = read_recorded(recorded.engine, "made", limit=3)
    assert [(chunk.window_id, chunk.start) for chunk in some] == [("0.0.0.0", 4), ("0.0.1.0", 4), ("0.0.2.0", 4)]
    assert len(read_recorded(recorded.engine, "made", limit=3, version=0)) == 3
    assert read_recorded(recorded.engine, "made", limit=3, version=1) == []
    assert read_recorded(recorded.engine, "other", limit=3) == []


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge-compare", str(tmp_path), str(tmp_path / "x.toml")]) == 2
    assert "headwater:" in capsys.readouterr().err

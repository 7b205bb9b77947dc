"""States of checkpoints on disk, and the line that each of them leaves: what a crash does to it."""

from pathlib import Path
from typing import BinaryIO

import pytest

from shared import checkpoint_state
from shared.checkpoint_state import (
    CheckpointState,
    Evidence,
    EvidenceFile,
    FinishedWindow,
    newest_checkpoint,
    newest_policy,
    read_states,
)
from shared.errors import HeadwaterError, TrainingError


def line(number: int, *windows: str) -> Evidence:
    finished = {one: FinishedWindow(entry_id=f"{number}-0", step=number, num_pairs=1) for one in windows}
    return Evidence(number=number, after=number - 1, step=number, finished=finished)


def write_state(root: Path, evidence: Evidence) -> CheckpointState:
    state = CheckpointState(weight_version=evidence.step, **dict(evidence))
    folder = root / f"step-{evidence.step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state.model_dump_json())
    return state


def test_states_are_read_by_step(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert (read_states(root), newest_checkpoint(root)) == ({}, None)
    with pytest.raises(HeadwaterError, match="did not get that far"):
        newest_policy(tmp_path)
    states = {number: write_state(root, line(number, "0.0.0.0")) for number in (1, 2)}
    (root / "step-00000003.tmp").mkdir()
    assert read_states(root) == states
    assert states[2].evidence == line(2, "0.0.0.0")
    assert newest_policy(tmp_path) == root / "step-00000002/policy"


def test_a_damaged_state_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    write_state(tmp_path, line(1))
    (tmp_path / "step-00000001/state.json").write_text('{"step": 1}')
    with pytest.raises(TrainingError, match=r"state\.json can't be read \(number: .*delete its folder"):
        read_states(tmp_path)


def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    file = EvidenceFile(tmp_path / "finished.jsonl")
    file.append(line(1, "0.0.0.0"))
    whole = file.path.read_bytes()
    file.append(line(2, "0.0.1.0"))
    both = file.path.read_bytes()
    for end in range(len(whole), len(both)):
        file.path.write_bytes(both[:end])
        assert file.read() == ([line(1, "0.0.0.0")], [])
        file.append(line(2, "0.0.1.0"))
        assert file.path.read_bytes() == both


def test_a_first_line_that_was_torn_is_written_again(tmp_path: Path) -> None:
    file = EvidenceFile(tmp_path / "finished.jsonl")
    file.path.write_text('{"number":1,"aft')
    file.append(line(1, "0.0.0.0"))
    assert file.read() == ([line(1, "0.0.0.0")], [])


def test_a_line_is_written_once_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.checkpoint_state._BLOCK_BYTES", 16)
    file = EvidenceFile(tmp_path / "finished.jsonl")
    for number in (1, 1, 2, 2, 1):
        file.append(line(number, *(f"0.0.{n}.{number}" for n in range(20))))
    assert [one.number for one in file.read()[0]] == [1, 2]


def test_what_a_successor_has_written_meanwhile_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer that was replaced is frozen after it has read the last line."""
    file = EvidenceFile(tmp_path / "finished.jsonl")
    file.append(line(1, "0.0.0.0"))
    found = checkpoint_state._last_line

    def freeze(opened: BinaryIO) -> tuple[bytes, int | None]:
        monkeypatch.setattr(checkpoint_state, "_last_line", found)
        last = found(opened)
        for number in (2, 3):
            file.append(line(number, f"0.0.{number}.0"))
        return last

    monkeypatch.setattr(checkpoint_state, "_last_line", freeze)
    file.append(line(2, "0.0.2.0"))
    assert file.read() == ([line(1, "0.0.0.0"), line(2, "0.0.2.0"), line(3, "0.0.3.0")], [])


def test_an_exact_copy_of_a_line_is_read_once_and_any_other_is_not_taken_for_one(tmp_path: Path) -> None:
    file = EvidenceFile(tmp_path / "finished.jsonl")
    for number in (1, 2):
        file.append(line(number, f"0.0.{number}.0"))
    first, second = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(first + second + first)
    assert file.read() == ([line(1, "0.0.1.0"), line(2, "0.0.2.0")], [])
    file.path.write_bytes(first + second + first.replace(b'"num_pairs":1', b'"num_pairs":2'))
    assert len(file.read()[0]) == 3


def test_a_damaged_line_is_named_and_never_written_over(tmp_path: Path) -> None:
    file = EvidenceFile(tmp_path / "finished.jsonl")
    file.append(line(1, "0.0.0.0"))
    file.path.write_bytes(file.path.read_bytes() + b"{}\n")
    assert file.read()[1] == ["line 2 can't be read: number: Field required"]
    with pytest.raises(TrainingError, match="move a damaged file away"):
        file.append(line(2, "0.0.1.0"))
    assert file.path.read_bytes().endswith(b"{}\n")

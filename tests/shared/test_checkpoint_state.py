"""The line that each checkpoint leaves, and what a crash does to it."""

from pathlib import Path

import pytest

from shared.checkpoint_state import Evidence, EvidenceFile, FinishedWindow
from shared.errors import TrainingError


def line(number: int, *windows: str) -> Evidence:
    finished = {one: FinishedWindow(entry_id=f"{number}-0", step=number, pairs_by_step={number: 1}) for one in windows}
    return Evidence(number=number, after=number - 1, step=number, finished=finished, partial={})


@pytest.fixture
def file(tmp_path: Path) -> EvidenceFile:
    return EvidenceFile(tmp_path / "finished.jsonl")


def test_a_torn_last_line_is_cut_off_and_written_again(file: EvidenceFile) -> None:
    file.append(line(1, "0.0.0.0"))
    whole = file.path.read_bytes()
    file.append(line(2, "0.0.1.0"))
    both = file.path.read_bytes()
    for end in range(len(whole), len(both)):
        file.path.write_bytes(both[:end])
        assert file.read() == ([line(1, "0.0.0.0")], [])
        file.append(line(2, "0.0.1.0"))
        assert file.path.read_bytes() == both


def test_a_first_line_that_was_torn_is_written_again(file: EvidenceFile) -> None:
    file.path.write_text('{"number":1,"aft')
    file.append(line(1, "0.0.0.0"))
    assert file.read() == ([line(1, "0.0.0.0")], [])


def test_a_line_is_written_once_however_long_it_is(file: EvidenceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.checkpoint_state._BLOCK_BYTES", 16)
    for number in (1, 1, 2, 2, 1):
        file.append(line(number, *(f"0.0.{n}.{number}" for n in range(20))))
    assert [one.number for one in file.read()[0]] == [1, 2]


def test_a_damaged_line_is_named_and_never_written_over(file: EvidenceFile) -> None:
    file.append(line(1, "0.0.0.0"))
    file.path.write_bytes(file.path.read_bytes() + b"{}\n")
    assert file.read()[1] == ["line 2 can't be read: Field required"]
    with pytest.raises(TrainingError, match="move a damaged file away"):
        file.append(line(2, "0.0.1.0"))
    assert file.path.read_bytes().endswith(b"{}\n")

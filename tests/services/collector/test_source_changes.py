"""A run goes on with the documents that it began with, or not at all; and it goes on when it may."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError, SourceError
from shared.ledger import WindowStart
from shared.records import WindowKey
from shared.settings import Settings
from tests.services.collector.processes import served
from tests.services.collector.runs import SENTENCE, Seen, collect_all, write_documents
from tests.services.collector.stub_services import StubServices

MakeSettings = Callable[..., Settings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    write_documents(folder / "b.jsonl", 4)
    return folder


def collected(make_settings: MakeSettings, folder: Path, **sections: dict[str, Any]) -> Seen:
    """What a collector leaves that starts now, as part of the test's one run."""
    documents = {"path": str(folder)} | sections.pop("documents", {})
    with served(StubServices().app) as url:
        return collect_all(make_settings(url, documents=documents, **sections))


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ({"num_parts": 2}, "documents.num_parts was 1 and is now 2"),
        ({"shuffle_buffer": 5}, "documents.shuffle_buffer was 4 and is now 5"),
    ],
)
def test_a_collector_with_another_identity_is_refused(
    make_settings: MakeSettings, folder: Path, documents: dict[str, Any], sentence: str
) -> None:
    collected(make_settings, folder)
    with pytest.raises(SettingsError, match=sentence):
        collected(make_settings, folder, documents={"max_epochs": 2} | documents)


def test_files_that_came_went_or_grew_are_named(make_settings: MakeSettings, folder: Path) -> None:
    write_documents(folder / "c.jsonl", 1)
    size = (folder / "b.jsonl").stat().st_size
    collected(make_settings, folder)
    write_documents(folder / "a.jsonl", 1)
    (folder / "c.jsonl").unlink()
    with (folder / "b.jsonl").open("a") as grown:
        grown.write("\n\n")
    with pytest.raises(SourceError) as refused:
        collected(make_settings, folder, documents={"max_epochs": 2})
    for words in ("1 file was added (a.jsonl)", "1 file is gone (c.jsonl)", f"b.jsonl: {size} bytes, now {size + 2}"):
        assert words in str(refused.value)
    assert "start a new run with --run.name NAME" in str(refused.value)


def test_another_record_at_an_unfinished_position_stops_the_collector(
    make_settings: MakeSettings, folder: Path
) -> None:
    seen = Seen(make_settings("http://127.0.0.1:1"))
    seen.ledger.begin([WindowStart(WindowKey(part=0, epoch=0, position=2, window=0), "d9", 32)])
    with pytest.raises(SourceError, match=r"position 2 .* was 'd9' .* and is 'd\d' now"):
        collected(make_settings, folder)
    assert seen.take_all() == []


def test_more_epochs_go_on_after_the_end(make_settings: MakeSettings, folder: Path) -> None:
    assert len(collected(make_settings, folder).take_all()) == 4
    found = collected(make_settings, folder, documents={"max_epochs": 3}).take_all()
    assert sorted(document.key.epoch for document in found) == [1] * 4 + [2] * 4


def test_a_file_name_that_is_not_utf8_is_read_and_can_be_read(make_settings: MakeSettings, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "documents")
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.jsonl", "wb") as file:
        file.write(b"{broken\n" + json.dumps({"text": SENTENCE}).encode() + b"\n")
    seen = collected(make_settings, Path(os.fsdecode(folder)))
    (document, *_) = seen.take_all()
    assert document.source_id == f"{tmp_path}/documents/caf\\xe9.jsonl:2"
    assert seen.balance.dropped == {"not_json": 1}

"""Every format, every refusal, the order and its exact resume."""

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from services.collector.sources.base import Document, Refusal
from services.collector.sources.huggingface import HuggingFaceReader
from services.collector.sources.source import Source, open_source
from shared.errors import SettingsError, SourceError
from shared.settings import DocumentsSettings


def opened(path: Path | str, **options: Any) -> Source:
    documents = DocumentsSettings(path=str(path), **{"shuffle_buffer": 1, **options})
    return open_source(documents, seed=7, vocabulary_size=100)


def everything(source: Source, *, part: int = 0, epoch: int = 0, start: int = 0) -> list[Document | Refusal]:
    return list(source.read(part, epoch=epoch, start=start))


def texts(items: Iterable[Document | Refusal]) -> list[Any]:
    return [item.content if isinstance(item, Document) else item.reason for item in items]


def only_refusal(source: Source) -> Refusal:
    (item,) = everything(source)
    assert isinstance(item, Refusal)
    return item


def lines(folder: Path, *content: bytes) -> Path:
    path = folder / "documents.jsonl"
    path.write_bytes(b"\n".join(content) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (b"{not json", "not_json", "not JSON"),
        (b'["text"]', "not_an_object", "expected a JSON object"),
        (b"17", "not_an_object", "expected a JSON object"),
        (b'{"body": "x"}', "no_text_field", "no field 'text' (documents.text_field); fields here: 'body'"),
        (b'{"text": 5}', "not_text", "is int, not text"),
        (b'{"text": null}', "not_text", "is null, not text"),
        (b'{"text": "a\xff"}', "invalid_utf8", "is not UTF-8"),
        (b'{"text": "\\ud800"}', "invalid_utf8", "half of a surrogate pair"),
        (b'{"text": " \\n"}', "empty", "is empty"),
        (b'{"text": "' + b"x" * 200 + b'"}', "too_large", "has 212 bytes, documents.max_document_bytes is 100"),
        (b"[" * 90, "not_json", "not JSON"),
    ],
)
def test_bad_line_is_refused_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str, said: str) -> None:
    path = lines(tmp_path, b'{"text": "good"}', line, b'{"text": "after"}')
    first, refusal, after = everything(opened(path, max_document_bytes=100))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.place, refusal.position) == (reason, f"{path}:2", 1)
    assert refusal.detail.startswith(f"{path}:2: ")
    assert said in refusal.detail
    assert texts([first, after]) == ["good", "after"]


@pytest.mark.parametrize("ids", [[1, 100], [-1], [1.5], ["3"], [True], [None], "12", 5])
def test_bad_token_ids_are_refused(tmp_path: Path, ids: object) -> None:
    path = lines(tmp_path, json.dumps({"ids": ids}).encode())
    refusal = only_refusal(opened(path, token_ids_field="ids"))
    assert refusal.reason == "bad_token_ids"


def test_token_ids_of_the_vocabulary_are_taken_as_they_are(tmp_path: Path) -> None:
    path = lines(tmp_path, b'{"ids": [0, 99, 5], "text": 3}', b'{"ids": []}')
    assert texts(everything(opened(path, token_ids_field="ids"))) == [(0, 99, 5), "empty"]


def test_lines_with_nan_byte_order_mark_windows_newlines_and_braces_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path, b'\xef\xbb\xbf{"text": "{a} {{b}}"}\r', b"", b'{"text": "\\u0000c", "score": NaN}')
    assert texts(everything(opened(path))) == ["{a} {{b}}", "\x00c"]


def test_blank_lines_are_no_records_but_lines_are_counted(tmp_path: Path) -> None:
    path = lines(tmp_path, b"", b'{"text": "a"}', b"   ", b"x")
    document, refusal = everything(opened(path))
    assert isinstance(document, Document)
    assert isinstance(refusal, Refusal)
    assert (document.position, document.source_id, refusal.place) == (0, f"{path}:2", f"{path}:4")


def test_source_id_is_the_documents_own_or_its_place(tmp_path: Path) -> None:
    path = lines(tmp_path, b'{"text": "a", "id": 12}', b'{"text": "b"}', b'{"text": "c", "id": ""}')
    found = [item.source_id for item in everything(opened(path)) if isinstance(item, Document)]
    assert found == ["12", f"{path}:2", f"{path}:3"]


def test_a_line_far_above_the_bound_never_lies_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 20_000_000 + b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    found = everything(opened(path, max_document_bytes=100_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts(found) == ["too_large", "after"]
    assert isinstance(found[0], Refusal)
    assert "20000012 bytes" in found[0].detail
    assert peak < 2_000_000


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".jsonl"])
def test_compressed_lines_are_read(tmp_path: Path, ending: str) -> None:
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}.get(ending, bytes)
    (tmp_path / f"documents{ending}").write_bytes(pack(b'{"text": "a"}\n{"text": "b"}'))
    assert texts(everything(opened(tmp_path))) == ["a", "b"]


def test_a_damaged_archive_is_refused_from_there_on_and_the_next_file_is_read(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % index for index in range(5000)), compresslevel=0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-4000])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "from b"}')
    found = everything(opened(tmp_path))
    assert texts(found)[-2:] == ["broken_file", "from b"]
    assert len(found) > 1000


def test_files_are_read_in_sorted_order_from_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl", "in/c.jsonl", ".hidden.jsonl", "d.csv"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts(everything(opened(tmp_path))) == ["a.jsonl", "b.jsonl", "in/c.jsonl"]
    assert texts(everything(opened(tmp_path / "*.jsonl"))) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_path_that_is_empty_or_matches_nothing_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError, match=r"nothing-\*.* matches no file"):
        opened(tmp_path / "nothing-*", format=kind)
    with pytest.raises(SettingsError, match=r"documents\.path is empty"):
        opened("")


def test_parquet_rows_are_read_over_files_and_row_groups(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    for name, rows in (("a", 130), ("b", 70)):
        table = pa.table({"text": [f"t{next(numbers)}" for _ in range(rows)], "other": [0] * rows})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=50)
    source = opened(tmp_path, format="parquet")
    assert texts(everything(source)) == [f"t{index}" for index in range(200)]
    assert texts(everything(source, start=128)) == [f"t{index}" for index in range(128, 200)]
    first = everything(source, start=131)[0]
    assert isinstance(first, Document)
    assert first.source_id == f"{tmp_path}/b.parquet:2"


def test_parquet_without_the_column_or_with_odd_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [None, "", "fine"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    found = everything(opened(tmp_path, format="parquet"))
    assert texts(found) == ["no_text_field", "not_text", "empty", "fine", "broken_file"]
    assert isinstance(found[0], Refusal)
    assert "'body'" in found[0].detail


def test_parquet_holds_token_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"ids": [[1, 2], [3, 1000]]}), tmp_path / "a.parquet")
    found = everything(opened(tmp_path, format="parquet", token_ids_field="ids"))
    assert texts(found) == [(1, 2), "bad_token_ids"]


def test_each_file_of_a_text_folder_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first {text}\n", encoding="utf-8")
    (tmp_path / "b.md").write_bytes(b"line\nbad \xff\n")
    (tmp_path / "c.txt").write_bytes(b"x" * 101)
    (tmp_path / "d.txt").write_bytes(b"")
    found = everything(opened(tmp_path, format="text", max_document_bytes=100))
    assert texts(found) == ["first {text}\n", "invalid_utf8", "too_large", "empty"]
    assert isinstance(found[1], Refusal)
    assert f"{tmp_path}/b.md:2:" in found[1].detail


def test_a_hugging_face_dataset_is_streamed_from_a_local_folder(tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"text": f"t{index}"}) for index in range(10))
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    source = opened(tmp_path, format="huggingface", num_parts=2)
    assert texts(everything(source, part=1)) == ["t1", "t3", "t5", "t7", "t9"]
    assert texts(everything(source, part=0, start=3)) == ["t6", "t8"]


def test_an_unknown_hugging_face_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SourceError, match=r"split = 'nowhere' can't be read"):
        everything(opened(tmp_path, format="huggingface", split="nowhere"))


def test_only_wanted_columns_of_a_hugging_face_dataset_are_held(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "id": "x", "other": "b"}')
    reader = HuggingFaceReader(str(tmp_path), subset="", split="train", columns=("text", "id"))
    (record,) = reader.read(start=0, step=1)
    assert (record.load(), record.num_bytes) == ({"text": "a", "id": "x"}, 2)
    source = opened(tmp_path, format="huggingface", text_field="body", id_field="none")
    refusal = only_refusal(source)
    assert refusal.reason == "no_text_field"
    assert "columns here: 'text', 'id', 'other'" in refusal.detail


@pytest.mark.parametrize("kind", ["jsonl", "huggingface"])
def test_a_manifest_has_the_names_from_the_root_and_the_sizes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("train.jsonl", "a"), ("in/train-2.jsonl", "four")):
        (tmp_path / name).write_text(json.dumps({"text": text}))
    files = {"train.jsonl": 13, "in/train-2.jsonl": 16}
    assert opened(tmp_path, format=kind).manifest().files == files
    if kind == "jsonl":
        assert opened(tmp_path / "in" / "*.jsonl").manifest().files == {"train-2.jsonl": 16}
        assert opened(tmp_path / "train.jsonl").manifest().files == {"train.jsonl": 13}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "text", "huggingface"])
def test_every_format_resumes_exactly_with_parts_and_shuffle(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [f"text {index}" for index in range(37)]
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        if ending == "parquet":
            pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=7)
        elif ending == "text":
            for row in part:
                (folder / f"{row.replace(' ', '-')}.txt").write_text(row)
        else:
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in part))
    source = opened(folder, format=ending, shuffle_buffer=5, num_parts=2)
    whole = [everything(source, part=part) for part in range(2)]
    assert sorted(str(text) for items in whole for text in texts(items)) == sorted(rows)
    for start in (0, 1, 4, 5, 11, 17, 18, 19):
        assert everything(source, part=1, start=start) == whole[1][start:]

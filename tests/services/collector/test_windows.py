"""Windows and chunks by hand, and the text shown of them."""

from pathlib import Path
from typing import Any

import pytest

from services.collector.preparing import Preparer
from services.collector.sources.base import Document
from services.collector.texts import PolicyTokenizer, TextSpan, WindowText
from services.collector.windows import Chunk, cut_windows, draw_chunks
from shared.records import DocumentKey
from shared.settings import ChunksSettings
from tests.services.collector.conftest import build_tokenizer


def chunks(**options: Any) -> ChunksSettings:
    sizes = {"context_tokens": 32, "suffix_tokens": 8, "min_prefix_tokens": 8, "min_suffix_tokens": 4}
    return ChunksSettings.model_validate(sizes | options)


def cut(num_tokens: int, **options: Any) -> list[tuple[int, int, list[tuple[int, int]]]]:
    spans = cut_windows(num_tokens, chunks(**options))
    return [(span.begin, span.end, [(chunk.start, chunk.end) for chunk in span.chunks]) for span in spans]


def test_one_window_holds_chunks_after_the_first_prefix() -> None:
    assert cut(32) == [(0, 32, [(8, 16), (16, 24), (24, 32)])]


def test_a_short_tail_is_context_only_and_a_longer_one_a_chunk() -> None:
    assert cut(19) == [(0, 19, [(8, 16)])]
    assert cut(20) == [(0, 20, [(8, 16), (16, 20)])]


def test_a_document_without_room_for_a_chunk_has_no_window() -> None:
    assert cut(0) == []
    assert cut(11) == []
    assert cut(12) == [(0, 12, [(8, 12)])]


def test_a_long_document_becomes_several_windows() -> None:
    assert cut(70) == [(0, 32, [(8, 16), (16, 24), (24, 32)]), (32, 64, [(8, 16), (16, 24), (24, 32)])]


def test_overlap_is_prefix_and_no_token_is_a_suffix_twice() -> None:
    found = cut(60, window_overlap_tokens=8)
    whole = [(8, 16), (16, 24), (24, 32)]
    assert found == [(0, 32, whole), (24, 56, whole), (48, 60, [(8, 12)])]
    covered = [begin + token for begin, _, spans in found for start, end in spans for token in range(start, end)]
    assert len(covered) == len(set(covered))


def test_a_window_that_would_hold_only_overlap_is_none() -> None:
    assert cut(32, window_overlap_tokens=16) == [(0, 32, [(8, 16), (16, 24), (24, 32)])]


def test_min_prefix_is_rounded_up_to_the_next_chunk_start() -> None:
    assert cut(32, min_prefix_tokens=9) == [(0, 32, [(16, 24), (24, 32)])]


def test_the_papers_shape_has_fifteen_chunks() -> None:
    (span,) = cut_windows(2048, ChunksSettings())
    assert (span.chunks[0], span.chunks[-1], len(span.chunks)) == (Chunk(128, 256), Chunk(1920, 2048), 15)


def test_drawn_chunks_are_the_same_for_the_same_key_and_in_order() -> None:
    found = tuple(Chunk(start, start + 8) for start in range(8, 80, 8))

    def draw(position: int, seed: int = 0) -> tuple[Chunk, ...]:
        key = DocumentKey(part=0, epoch=0, position=position, window=0)
        return draw_chunks(found, key=key, chunks_per_document=3, seed=seed)

    assert draw(1) == draw(1) == tuple(sorted(draw(1), key=lambda chunk: chunk.start))
    assert len({draw(position) for position in range(20)}) > 10
    assert draw(1, seed=1) != draw(1) or draw(2, seed=1) != draw(2)


def test_a_document_becomes_windows_with_keys_and_ids(tokenizer: PolicyTokenizer) -> None:
    preparer = Preparer(tokenizer, chunks(), seed=0)
    windows = preparer.windows(Document(5, "d5", tuple(range(2, 72))), part=1, epoch=2)
    assert [str(window.key) for window in windows] == ["1.2.5.0", "1.2.5.1"]
    assert windows[1].token_ids == tuple(range(34, 66))
    assert {window.source_id for window in windows} == {"d5"}


def test_bos_is_added_exactly_where_the_tokenizer_wants_one(tokenizer: PolicyTokenizer, tmp_path: Path) -> None:
    with_bos = PolicyTokenizer(str(build_tokenizer(tmp_path, adds_bos=True)))
    assert with_bos.encode("moon") == [0, *tokenizer.encode("moon")]
    assert 0 not in tokenizer.encode("moon")
    chunk = Chunk(1, len(with_bos.encode("moon")))
    assert with_bos.show(with_bos.encode("moon"), [chunk]) == WindowText("moon", (TextSpan(0, 4),))


@pytest.mark.parametrize(
    "text", ["</s><s>", "{prefix} {0} %s", "a\x00b", " \n\t x", "\ufffd \ufffd\ufffd", "漢字é🦀" * 3]
)
def test_odd_text_is_shown_as_it_was(tokenizer: PolicyTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids), "control tokens written in a document are text"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["aé🦀漢", "🦀🦀", "moon é earth 漢字 water"])
def test_a_character_cut_by_a_border_is_in_neither_text(tokenizer: PolicyTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for border in range(1, len(ids)):
        shown = tokenizer.show(ids, [Chunk(border, len(ids))])
        prefix, suffix = shown.prefix(0), shown.suffix(0)
        assert text.startswith(prefix)
        assert text.endswith(suffix)
        assert len(text) - len(prefix) - len(suffix) in (0, 1)
        assert "\ufffd" not in prefix + suffix


def test_a_replacement_character_of_the_document_itself_stays(tokenizer: PolicyTokenizer) -> None:
    ids = tokenizer.encode("moon \ufffd\ufffd")
    shown = tokenizer.show([*ids, *tokenizer.encode("x")], [Chunk(len(ids), len(ids) + 1)])
    assert (shown.prefix(0), shown.suffix(0)) == ("moon \ufffd\ufffd", "x")


def test_chunks_of_a_window_read_on_from_each_other(tokenizer: PolicyTokenizer) -> None:
    text = "The moon moves around the earth in about twenty-seven days."
    ids = tokenizer.encode(text)
    spans = [Chunk(4, 8), Chunk(8, 12), Chunk(12, len(ids))]
    shown = tokenizer.show(ids, spans)
    assert "".join([shown.prefix(0), *(shown.suffix(index) for index in range(3))]) == text
    assert shown.prefix(1) == shown.prefix(0) + shown.suffix(0)

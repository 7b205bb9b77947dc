"""Windows and chunks by hand, and the text shown of them."""

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.collector.sources.base import Document
from services.collector.windows import Chunk, Cutter, PolicyTokenizer, TextSpan, WindowMaker, WindowText, draw_chunks
from shared.records import DroppedChunk, WindowKey
from shared.settings import ChunksSettings
from tests.services.collector.conftest import build_tokenizer


def chunks(**options: Any) -> ChunksSettings:
    sizes = {"context_tokens": 32, "suffix_tokens": 8, "min_prefix_tokens": 8, "min_suffix_tokens": 4}
    return ChunksSettings.model_validate(sizes | options)


WHOLE = [(8, 16), (16, 24), (24, 32)]


@pytest.mark.parametrize(
    ("num_tokens", "options", "windows"),
    [
        (32, {}, [(0, 32, WHOLE)]),
        (32, {"min_prefix_tokens": 9}, [(0, 32, [(9, 17), (17, 25), (25, 32)])]),
        # a short tail is context only, a longer one a chunk
        (19, {}, [(0, 19, [(8, 16)])]),
        (20, {}, [(0, 20, [(8, 16), (16, 20)])]),
        # no room for a chunk: no window
        (0, {}, []),
        (11, {}, []),
        (12, {}, [(0, 12, [(8, 12)])]),
        # several windows; overlap is prefix, and no token is a suffix twice
        (70, {}, [(0, 32, WHOLE), (32, 64, WHOLE)]),
        (60, {"window_overlap_tokens": 8}, [(0, 32, WHOLE), (24, 56, WHOLE), (48, 60, [(8, 12)])]),
        (60, {"window_overlap_tokens": 11},
         [(0, 32, WHOLE), (21, 53, [(11, 19), (19, 27), (27, 32)]), (42, 60, [(11, 18)])]),
        (32, {"window_overlap_tokens": 16}, [(0, 32, WHOLE)]),
        # two tokens behind the chunk that ends at 30 are too few for one: the window ends there
        (60, {"suffix_tokens": 11, "window_overlap_tokens": 9},
         [(0, 30, [(8, 19), (19, 30)]), (21, 52, [(9, 20), (20, 31)]), (43, 60, [(9, 17)])]),
    ],
)  # fmt: skip
def test_a_document_is_cut_into_windows_and_chunks(num_tokens: int, options: dict[str, int], windows: Any) -> None:
    spans = Cutter(chunks(**options)).cut(num_tokens)
    assert [(span.begin, span.end, [(chunk.start, chunk.end) for chunk in span.chunks]) for span in spans] == windows


def test_the_papers_shape_has_fifteen_chunks() -> None:
    (span,) = Cutter(ChunksSettings()).cut(2048)
    assert (span.chunks[0], span.chunks[-1], len(span.chunks)) == (Chunk(128, 256), Chunk(1920, 2048), 15)


def test_a_bos_counts_in_each_windows_length_and_first_prefix() -> None:
    spans = Cutter(ChunksSettings(window_overlap_tokens=128), num_opening=1).cut(5000)
    assert [(span.begin, span.end) for span in spans] == [(0, 2047), (1919, 3966), (3838, 5000)]
    assert [span.chunks[0] for span in spans] == [Chunk(128, 256), Chunk(129, 257), Chunk(129, 257)]
    assert [span.chunks[-1].end for span in spans] == [2048, 2048, 1153]


def test_borders_move_back_to_where_a_character_begins_and_a_first_one_forward() -> None:
    """Characters of three tokens: the first chunk starts at 9, ends at 15 instead of 17, and so on."""
    (span,) = Cutter(chunks()).cut(32, lambda token: token % 3 == 0)
    assert span.chunks == (Chunk(9, 15), Chunk(15, 21), Chunk(21, 27), Chunk(27, 32))


def test_where_no_character_begins_the_cut_stays() -> None:
    (span,) = Cutter(chunks()).cut(20, lambda token: False)
    assert span.chunks == (Chunk(8, 16), Chunk(16, 20))


BOUNDS = {
    "context_tokens": (24, 60), "suffix_tokens": (4, 12), "min_prefix_tokens": (1, 12), "min_suffix_tokens": (1, 4),
    "window_overlap_tokens": (0, 16),
}  # fmt: skip
SIZES = st.fixed_dictionaries({name: st.integers(*bounds) for name, bounds in BOUNDS.items()})


@settings(deadline=None, max_examples=300, derandomize=True)
@given(SIZES, st.lists(st.integers(1, 4), min_size=1, max_size=120), st.integers(0, 1))
def test_every_token_is_in_one_chunk_or_is_context_by_a_rule(
    sizes: dict[str, int], characters: list[int], num_opening: int
) -> None:
    found = ChunksSettings.model_validate(sizes)
    begins = set(accumulate(characters, initial=0))
    num_tokens = sum(characters)
    spans = Cutter(found, num_opening=num_opening).cut(num_tokens, lambda token: token in begins)
    covered = Counter[int]()
    done = 0
    for span in spans:
        assert span.end - span.begin + num_opening <= found.context_tokens
        starts = [chunk.start + span.begin - num_opening for chunk in span.chunks]
        ends = [chunk.end + span.begin - num_opening for chunk in span.chunks]
        assert {span.begin, span.end, *starts, *ends} <= begins
        assert span.chunks[0].start >= found.min_prefix_tokens
        assert starts[1:] == ends[:-1], "no gap inside a window"
        overlap = done - span.begin
        assert 0 <= overlap <= found.window_overlap_tokens
        gap = starts[0] - done
        assert gap == 0 or gap <= found.min_prefix_tokens - num_opening - overlap + 3, "only for its prefix"
        assert all(chunk.num_tokens <= found.suffix_tokens for chunk in span.chunks)
        assert all(chunk.num_tokens >= found.suffix_tokens - 3 for chunk in span.chunks[:-1])
        assert span.chunks[-1].num_tokens >= min(found.min_suffix_tokens, found.suffix_tokens - 3)
        covered.update(token for start, end in zip(starts, ends, strict=True) for token in range(start, end))
        done = ends[-1]
    assert max(covered.values(), default=1) == 1
    left = num_tokens - done
    longest_rest = max(found.min_prefix_tokens - num_opening + 3, 0) + found.min_suffix_tokens
    assert left < longest_rest, "a rest that is too short for prefix and suffix"


def test_an_overlap_that_leaves_no_room_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"= 33 exceeds context_tokens = 32: windows after the first would have no"):
        chunks(window_overlap_tokens=25)


def test_drawn_chunks_are_the_same_for_the_same_key_and_in_order() -> None:
    found = tuple(Chunk(start, start + 8) for start in range(8, 80, 8))

    def draw(position: int, seed: int = 0) -> tuple[Chunk, ...]:
        key = WindowKey(part=0, epoch=0, position=position, window=0)
        return draw_chunks(found, key=key, chunks_per_window=3, seed=seed)

    assert draw(1) == draw(1) == tuple(sorted(draw(1), key=lambda chunk: chunk.start))
    assert len({draw(position) for position in range(20)}) > 10
    assert draw(1, seed=1) != draw(1) or draw(2, seed=1) != draw(2)


def test_a_document_becomes_windows_with_keys_and_ids(tokenizer: PolicyTokenizer) -> None:
    maker = WindowMaker(tokenizer, chunks(end_of_text=False), seed=0)
    windows = maker.windows(Document(5, "d5", tuple(range(2, 72))), part=1, epoch=2)
    assert [str(window.key) for window in windows] == ["1.2.5.0", "1.2.5.1"]
    assert windows[1].token_ids == tuple(range(34, 66))
    assert {window.source_id for window in windows} == {"d5"}


BOS, EOS = 0, 1
MOON = "The moon moves around the earth. " * 8


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> PolicyTokenizer:
    return PolicyTokenizer(str(build_tokenizer(tmp_path_factory.mktemp("bos"), adds_bos=True)))


@pytest.mark.parametrize("given", ["text", "ids", "ids with BOS", "ids with both"])
def test_each_window_begins_with_one_bos_and_the_document_ends_with_one_eos(
    with_bos: PolicyTokenizer, given: str
) -> None:
    ids = tuple(with_bos.encode(MOON))
    contents = {"ids": ids, "ids with BOS": (BOS, *ids), "ids with both": (BOS, *ids, EOS)}
    document = Document(0, "d", contents.get(given, MOON))
    windows = WindowMaker(with_bos, chunks(), seed=0).windows(document, part=0, epoch=0)
    assert len(windows) > 2
    assert all(window.token_ids[0] == BOS and BOS not in window.token_ids[1:] for window in windows)
    assert [EOS in window.token_ids for window in windows] == [False] * (len(windows) - 1) + [True]
    assert sum((window.token_ids[1:] for window in windows), ()) == (*ids, EOS)
    assert max(len(window.token_ids) for window in windows) == 32


def test_no_bos_where_the_tokenizer_wants_none_and_no_eos_where_none_is_asked_for(tokenizer: PolicyTokenizer) -> None:
    maker = WindowMaker(tokenizer, chunks(end_of_text=False), seed=0)
    windows = maker.windows(Document(0, "d", MOON), part=0, epoch=0)
    assert not {BOS, EOS} & {token_id for window in windows for token_id in window.token_ids}


def test_bos_and_end_of_text_are_not_shown(with_bos: PolicyTokenizer) -> None:
    ids = (BOS, *with_bos.encode("moon moon"), EOS)
    half = 1 + len(with_bos.encode("moon"))
    shown = with_bos.show(ids, [Chunk(1, half), Chunk(half, len(ids))])
    assert shown == WindowText("moon moon", (TextSpan(0, 4, begins_text=True), TextSpan(4, 9, ends_document=True)))


@pytest.mark.parametrize(("hidden", "reason"), [([EOS], "control_token"), ([-2], "broken_text")])
def test_a_chunk_that_can_not_be_shown_is_dropped_with_its_reason(
    tokenizer: PolicyTokenizer, hidden: list[int], reason: str
) -> None:
    """-2 stands for the first half of a character."""
    half = tokenizer.encode("é")[0]
    ids = [*tokenizer.encode(MOON)[:19], *(half if token == -2 else token for token in hidden)]
    ids += tokenizer.encode(MOON)[:12]
    (window,) = WindowMaker(tokenizer, chunks(), seed=0).windows(Document(0, "d", tuple(ids)), part=0, epoch=0)
    assert window.dropped == (DroppedChunk(start=16, reason=reason),)
    assert window.chunks == (Chunk(8, 16), Chunk(24, 32))


def test_a_window_of_128k_tokens_is_shown_in_linear_time(tokenizer: PolicyTokenizer) -> None:
    """By a count of what passes through the tokenizer: seconds say little on a busy machine."""
    ids = tokenizer.encode(MOON * 2000)[: 2**17]
    asked: list[int] = []
    decode = tokenizer._codec._decode
    tokenizer._codec._decode = lambda token_ids: asked.append(len(token_ids)) or decode(token_ids)  # type: ignore[method-assign, func-returns-value]
    try:
        shown = tokenizer.show(ids, [Chunk(start, start + 128) for start in range(128, 2**17, 128)])
    finally:
        tokenizer._codec._decode = decode  # type: ignore[method-assign]
    assert sum(asked) < 1.2 * 2**17
    assert shown.text == decode(ids)


@pytest.mark.parametrize(
    "text", ["</s><s>", "{prefix} {0} %s", "a\x00b", " \n\t x", "\ufffd \ufffd\ufffd", "漢字é🦀" * 3]
)
def test_odd_text_is_shown_as_it_was(tokenizer: PolicyTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids), "control tokens written in a document are text"
    assert tokenizer.decode(ids) == text


def prefix_of(shown: WindowText) -> str:
    return shown.text[: shown.spans[0].start]


@pytest.mark.parametrize("text", ["aé🦀漢", "🦀🦀", "moon é earth 漢字 water"])
def test_a_character_cut_by_a_border_is_in_neither_text(tokenizer: PolicyTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for border in range(1, len(ids)):
        shown = tokenizer.show(ids, [Chunk(border, len(ids))])
        prefix, suffix = prefix_of(shown), shown.suffix(0)
        assert text.startswith(prefix)
        assert text.endswith(suffix)
        assert len(text) - len(prefix) - len(suffix) in (0, 1)
        assert "\ufffd" not in prefix + suffix


def test_a_replacement_character_of_the_document_itself_stays(tokenizer: PolicyTokenizer) -> None:
    ids = tokenizer.encode("moon \ufffd\ufffd")
    shown = tokenizer.show((*ids, *tokenizer.encode("x")), [Chunk(len(ids), len(ids) + 1)])
    assert (prefix_of(shown), shown.suffix(0)) == ("moon \ufffd\ufffd", "x")


def test_chunks_of_a_window_read_on_from_each_other(tokenizer: PolicyTokenizer) -> None:
    text = "The moon moves around the earth in about twenty-seven days."
    ids = tokenizer.encode(text)
    spans = [Chunk(4, 8), Chunk(8, 12), Chunk(12, len(ids))]
    shown = tokenizer.show(ids, spans)
    assert "".join([prefix_of(shown), *(shown.suffix(index) for index in range(3))]) == shown.text == text

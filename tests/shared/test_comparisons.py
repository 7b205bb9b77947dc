"""Comparisons travel packed and come back as they were."""

import msgpack
import pytest

from shared.comparisons import PACKED_BYTES, of_rows, pack, rows, unpack
from shared.errors import StreamError
from shared.records import Comparison
from shared.stream import decode, encode
from tests.shared.scored import scored_window

COMPARISONS = (
    Comparison(criterion="quality", first=0, second=1, value=0.1),
    Comparison(criterion="coherence", first=1, second=0, value=None),
    Comparison(criterion="quality", first=144, second=3, value=1.0),
    Comparison(criterion="quality", first=3, second=144, value=0.0),
)


def test_packed_comparisons_come_back_in_their_order_to_the_last_bit() -> None:
    packed = msgpack.unpackb(msgpack.packb(pack(COMPARISONS)))
    assert tuple(Comparison(**fields) for fields in unpack(packed)) == COMPARISONS


def test_a_comparison_takes_a_quarter_of_its_bytes_as_a_map() -> None:
    many = COMPARISONS[:1] * 77
    plain = len(msgpack.packb([one.model_dump() for one in many]))
    packed = len(msgpack.packb(pack(many)))
    assert PACKED_BYTES == 13
    assert packed < 77 * 13 + 40
    assert packed < 0.3 * plain


def test_a_window_on_the_stream_keeps_comparisons_bars_and_missing_scores() -> None:
    window = scored_window()
    (chunk,) = window.chunks
    assert chunk.judgement is not None
    update = {
        "comparisons": COMPARISONS[:2],
        "barred": (1,),
        "rewards": (0.5, None),
        "scores": {"quality": (0.5, None)},
    }
    judged = chunk.model_copy(update={"judgement": chunk.judgement.model_copy(update=update)})
    unjudged = chunk.model_copy(update={"start": 3, "judgement": None})
    window = window.model_copy(update={"chunks": (judged, unjudged)})
    assert decode(encode(window)) == window


@pytest.mark.parametrize(
    "packed", [None, [], {"criteria": [], "rows": b"1234567890123"}, {"criteria": [], "rows": b"1"}]
)
def test_what_was_not_packed_is_refused(packed: object) -> None:
    with pytest.raises(ValueError, match="not packed as expected"):
        unpack(packed)


def test_an_entry_without_packed_comparisons_is_no_window() -> None:
    import zstandard

    fields = scored_window().model_dump()
    body = zstandard.ZstdCompressor().compress(msgpack.packb(fields))
    with pytest.raises(StreamError, match="not a scored window"):
        decode(body)


def test_rows_are_lists_for_json() -> None:
    assert rows(COMPARISONS[:2]) == [["quality", 0, 1, 0.1], ["coherence", 1, 0, None]]
    assert of_rows(rows(COMPARISONS)) == COMPARISONS

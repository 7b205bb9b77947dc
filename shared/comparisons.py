"""Comparisons as bytes on the stream and as rows in the database. Used by shared/stream.py and shared/runs.py.

A chunk has tens to hundreds of comparisons. As msgpack maps they take about 50 bytes each, packed 13.

    pack((Comparison(criterion="quality", first=0, second=3, value=0.75),))
    # {"criteria": ["quality"], "rows": b"..."}
    rows((Comparison(criterion="quality", first=0, second=3, value=0.75),))
    # [["quality", 0, 3, 0.75]]
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

from shared.records import Comparison

_ROW = struct.Struct("<BHHd")
"""Place of the criterion, `first`, `second`, and the value, which is NaN where no verdict could be read."""
PACKED_BYTES = _ROW.size
"""Of one comparison."""


def pack(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Without loss: values stay doubles."""
    criteria = list(dict.fromkeys(one.criterion for one in comparisons))
    places = {criterion: place for place, criterion in enumerate(criteria)}
    packed = (
        _ROW.pack(places[one.criterion], one.first, one.second, math.nan if one.value is None else one.value)
        for one in comparisons
    )
    return {"criteria": criteria, "rows": b"".join(packed)}


def unpack(packed: Any) -> list[dict[str, Any]]:
    """Fields of the comparisons. ValueError if it is not what `pack` gives."""
    try:
        criteria = packed["criteria"]
        return [
            {"criterion": criteria[place], "first": first, "second": second, "value": _none_if_nan(value)}
            for place, first, second, value in _ROW.iter_unpack(packed["rows"])
        ]
    except (LookupError, TypeError, struct.error) as exc:
        raise ValueError(f"comparisons are not packed as expected: {exc!r}") from exc


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def rows(comparisons: Sequence[Comparison]) -> list[list[Any]]:
    """For JSON: criterion, first, second and value of each."""
    return [[one.criterion, one.first, one.second, one.value] for one in comparisons]


def of_rows(found: Sequence[Sequence[Any]]) -> tuple[Comparison, ...]:
    """What `rows` made them of: the judge's past verdicts, for replays."""
    return tuple(
        Comparison(criterion=criterion, first=first, second=second, value=value)
        for criterion, first, second, value in found
    )

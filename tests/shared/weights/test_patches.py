"""Applying the changes gives the new state to the last bit, whatever the bits are; bad updates are refused."""

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.errors import WeightStoreError
from shared.weights.patches import (
    PREFIX,
    apply_patches,
    decode_patches,
    encode_patches,
    find_patch,
    foresee,
)
from shared.weights.state import BitTensor, State, StateSums, state_checksum
from tests.shared.weights.states import bf16, equal, find_patches, state_of


def sent(base: State, new: State) -> dict[str, BitTensor]:
    """What a replica with `base` makes of the update."""
    content = encode_patches(find_patches(base, new), base)
    received = {name: BitTensor(tensor.dtype, tensor.shape, tensor.bits.copy()) for name, tensor in base.items()}
    apply_patches(received, decode_patches(content, received, where="update"))
    return received


@st.composite
def two_states(draw: st.DrawFn) -> tuple[State, State]:
    """Of one layout, with few or many elements changed to any bits."""
    base, new = {}, {}
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["u1", "u2", "u4", "u8"]))
        shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
        before = draw(arrays.arrays(kind, shape))
        changed = draw(arrays.arrays(np.bool_, shape))
        base[f"t{number}"] = before
        new[f"t{number}"] = np.where(changed, draw(arrays.arrays(kind, shape)), before).astype(kind)
    return state_of(**base), state_of(**new)


@given(two_states())
def test_any_change_of_bits_arrives(states: tuple[State, State]) -> None:
    base, new = states
    received = sent(base, new)
    assert equal(received, new)
    assert state_checksum(received) == state_checksum(new)
    foreseen, _ = foresee(StateSums.of(base), find_patches(base, new), base)
    assert foreseen.checksum == state_checksum(new)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_difference_of_bits_survives_at_the_ends_of_the_range(width: int) -> None:
    most = 2 ** (8 * width) - 1
    values = [0, 1, most // 2, most // 2 + 1, most - 1, most]
    pairs = [(before, after) for before in values for after in values]
    kind = f"u{width}"
    base = state_of(x=np.array([before for before, _ in pairs], kind))
    new = state_of(x=np.array([after for _, after in pairs], kind))
    assert equal(sent(base, new), new)


def test_negative_zero_and_the_payloads_of_nans_are_kept() -> None:
    nans = np.array([0x7FC0, 0x7FC1, 0xFFC0, 0x7F81], np.uint16)
    base = state_of(zero=bf16(0.0, 0.0, 1.0), nan=nans)
    new = state_of(zero=bf16(-0.0, 0.0, 1.0), nan=np.roll(nans, 1))
    assert [len(patch.indices) for patch in find_patches(base, new)] == [4, 1]
    assert equal(sent(base, new), new)


def test_equal_states_are_an_update_without_changes() -> None:
    state = state_of(x=bf16(1.0, float("nan")), scalar=np.uint16(7))
    assert find_patches(state, state) == []
    assert equal(sent(state, state), state)


def test_a_scalar_may_change() -> None:
    base, new = state_of(scalar=np.uint16(7)), state_of(scalar=np.uint16(9))
    assert base["scalar"].shape == ()
    assert equal(sent(base, new), new)


@pytest.mark.parametrize("last", [254, 255, 256, 65_535, 65_536, 70_000])
def test_indices_far_apart_are_kept(last: int) -> None:
    base = state_of(x=np.zeros(80_000, np.uint16))
    bits = np.zeros(80_000, np.uint16)
    bits[[0, last]] = 5
    assert equal(sent(base, state_of(x=bits)), state_of(x=bits))


def test_a_few_small_changes_take_few_bytes() -> None:
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 2**16, 1_000_000, np.uint16)
    changed = draw.random(bits.shape) < 0.02
    moved = (bits + np.where(changed, draw.choice([1, 65_535], bits.shape), 0)).astype(np.uint16)
    base, new = state_of(x=bits), state_of(x=moved)
    assert len(encode_patches(find_patches(base, new), base)) < 0.02 * bits.nbytes
    assert equal(sent(base, new), new)


def rebuilt(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header."""
    payload = zstandard.ZstdDecompressor().decompress(content.removeprefix(PREFIX))
    (length,) = struct.unpack("<I", payload[:4])
    header = json.loads(payload[4 : 4 + length])
    change(header)
    words = json.dumps(header).encode()
    return PREFIX + zstandard.compress(struct.pack("<I", len(words)) + words + payload[4 + length :])


def set_field(number: int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["tensors"][0][number] = value

    return change


BASE = state_of(x=np.zeros((2, 5), np.uint16))
NEW = state_of(x=np.array([[0, 1, 0, 0, 0], [0, 0, 0, 0, 2]], np.uint16))
UPDATE = encode_patches(find_patches(BASE, NEW), BASE)

BROKEN = {
    "the base has no tensor 'y'": rebuilt(UPDATE, set_field(0, "y")),
    "has dtype F16, the base's is BF16": rebuilt(UPDATE, set_field(1, "F16")),
    r"shape \(5, 2\), the base's is \(2, 5\)": rebuilt(UPDATE, set_field(2, [5, 2])),
    "has 11 changes and 10 elements": rebuilt(UPDATE, set_field(3, 11)),
    "has -1 changes": rebuilt(UPDATE, set_field(3, -1)),
    "has 6 bytes of changes, its header says 9": rebuilt(UPDATE, set_field(3, 3)),
    "has 6 bytes of changes, its header says 3": rebuilt(UPDATE, set_field(3, 1)),
    "unreadable header": rebuilt(UPDATE, lambda header: header.pop("tensors")),
    "an invalid index width": rebuilt(UPDATE, lambda header: header.update(index_width=3)),
    "or a name that occurs twice": rebuilt(UPDATE, lambda header: header["tensors"].append(header["tensors"][0])),
    "in a form that this version reads": b"headwater-sparse-9\n" + UPDATE.removeprefix(PREFIX),
    "can't be unpacked": UPDATE[:-7],
    "would unpack to": PREFIX + zstandard.compress(bytes((1 << 26) + 1000)),
}


@pytest.mark.parametrize("words", BROKEN)
def test_an_update_that_does_not_fit_its_base_is_refused(words: str) -> None:
    with pytest.raises(WeightStoreError, match=words):
        decode_patches(BROKEN[words], BASE, where="update")


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_index_beyond_the_tensor_is_refused(width: int) -> None:
    """Distances are unsigned, and the largest ones wrap around: 12 and then -5 would end at 8."""
    words = json.dumps({"index_width": width, "tensors": [["x", "BF16", [2, 5], 2]]}).encode()
    for distances in ([3, 6], [10, 0], [2 ** (8 * width) - 1] * 2, [12, 2 ** (8 * width) - 5]):
        planes = np.array(distances, f"<u{width}").view(np.uint8).reshape(2, width).T.tobytes()
        content = PREFIX + zstandard.compress(struct.pack("<I", len(words)) + words + planes + bytes(4))
        with pytest.raises(WeightStoreError, match="lies beyond its 10 elements"):
            decode_patches(content, BASE, where="update")


def test_the_last_element_may_change() -> None:
    assert equal(sent(BASE, NEW), NEW)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_sums_follow_changes_over_several_rows(width: int) -> None:
    draw = np.random.default_rng(width)
    before = draw.integers(0, 2 ** (8 * width) - 1, 300_000 // width, f"u{width}", endpoint=True)
    after = np.where(draw.random(before.shape) < 0.01, before[::-1], before)
    base, new = state_of(x=before, y=bf16(1.0)), state_of(x=after, y=bf16(-1.0))
    foreseen, changed = foresee(StateSums.of(base), find_patches(base, new), base)
    assert foreseen.checksum == state_checksum(new) != state_checksum(base)
    values = after[after != before].tobytes() + bf16(-1.0).tobytes()
    assert changed == f"xxh3_128:{xxhash.xxh3_128_hexdigest(values)}"


def test_bits_that_are_not_the_bases_any_more_show_in_the_checksum_of_the_changed() -> None:
    """The sums alone can't tell: they follow the differences."""
    base, new = state_of(x=bf16(1.0, 2.0, 3.0)), state_of(x=bf16(1.0, 2.5, 3.0))
    rotten = state_of(x=bf16(1.0, 4.0, 3.0))
    patches, sums = find_patches(base, new), StateSums.of(base)
    (good, changed), (also_good, other) = foresee(sums, patches, base), foresee(sums, patches, rotten)
    assert good.checksum == also_good.checksum
    assert changed != other


def test_changes_of_one_tensor_may_come_in_two_files() -> None:
    draw = np.random.default_rng(3)
    base = state_of(x=draw.integers(0, 2**16, 100_000, np.uint16))
    new = state_of(x=(base["x"].bits + (draw.random(100_000) < 0.1)).astype(np.uint16))
    before, after = base["x"].bits, new["x"].bits
    cut = 60_000
    halves = [find_patch("x", before[:cut], after[:cut]), find_patch("x", before[cut:], after[cut:], start=cut)]
    files = [encode_patches([half], base) for half in halves]
    patches = [patch for file in files for patch in decode_patches(file, base, where="update")]
    foreseen, changed = foresee(StateSums.of(base), patches, base)
    assert foreseen.checksum == state_checksum(new)
    assert changed == f"xxh3_128:{xxhash.xxh3_128_hexdigest(after[after != before].tobytes())}"
    apply_patches(base, patches)
    assert equal(base, new)

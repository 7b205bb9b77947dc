"""A state is the bits of a safetensors file, with a checksum that sees all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from shared.errors import WeightStoreError
from shared.weights.state import (
    BitTensor,
    StateSums,
    lay_out_files,
    map_folder,
    map_state,
    parse_state,
    state_checksum,
    write_state,
)
from tests.shared.weights.states import bf16, equal, state_of


def test_a_state_is_read_from_memory_and_disk_alike(tmp_path: Path) -> None:
    content = save({"a": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.tensor(7), "none": torch.empty(0, 2)})
    (tmp_path / "x.safetensors").write_bytes(content)
    mapped, parsed = map_state(tmp_path / "x.safetensors"), parse_state(content, where="x")
    assert equal(mapped, parsed)
    assert {name: tensor.layout for name, tensor in parsed.items()} == {
        "a": ("BF16", (3, 4)),
        "b": ("I64", ()),
        "none": ("F32", (0, 2)),
    }


def test_a_written_state_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3).to(torch.bfloat16), "i": torch.arange(5), "f": torch.randn(2, 2)}
    write_state(tmp_path / "x.safetensors", parse_state(save(tensors), where="x"), {})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_state_is_laid_out_in_files_of_bounded_size(tmp_path: Path) -> None:
    """A tensor that is larger than a file may be has one of its own."""
    layouts = {
        "a": ("F32", (4,)),
        "b": ("F32", (4,)),
        "large": ("BF16", (100,)),
        "c": ("BF16", (2,)),
        "d": ("U8", (3,)),
    }
    files = lay_out_files(layouts, {"format": "pt"}, max_bytes=32)
    assert [list(file.offsets) for file in files] == [["a", "b"], ["large"], ["c", "d"]]
    for number, file in enumerate(files):
        content = file.header + bytes(file.num_bytes - len(file.header))
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    assert {name: tensor.layout for name, tensor in map_folder(tmp_path).items()} == layouts


def test_a_folder_without_a_file_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(WeightStoreError, match=r"no \*\.safetensors file"):
        map_folder(tmp_path)


def splitmix64(number: int) -> int:
    """The `number`th output of the generator with seed 0, from its definition."""
    mixed = number * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


@pytest.mark.parametrize("num_bytes", [0, 1, 3, 4, 65_535, 65_536, 65_537, 150_001])
def test_a_row_is_summed_word_by_word(num_bytes: int) -> None:
    weights = [splitmix64(number) | 1 for number in range(1, 16_385)]
    assert splitmix64(1) == 0xE220A8397B1DCDAF  # of the published generator
    content = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    rows = [content[start : start + 65_536].tobytes() for start in range(0, num_bytes, 65_536)]
    words = [[int.from_bytes(row[at : at + 4], "little") for at in range(0, len(row), 4)] for row in rows]
    expected = [sum(word * weight for word, weight in zip(row, weights, strict=False)) % 2**64 for row in words]
    assert StateSums.of(state_of(x=content)).rows["x"].tolist() == expected


def test_the_checksum_sees_names_layouts_and_bits_but_not_the_order() -> None:
    state = state_of(a=bf16(1.0, 2.0), b=bf16(3.0))
    others = [
        state_of(a=bf16(1.0, 2.0), c=bf16(3.0)),
        state_of(a=bf16(1.0, 2.0).reshape(2, 1), b=bf16(3.0)),
        state_of(a=bf16(1.0), b=bf16(2.0, 3.0)),
        state_of(a=bf16(1.0, 2.0), b=bf16(-3.0)),
        state | {"b": BitTensor("F16", (1,), state["b"].bits)},
    ]
    assert len({state_checksum(state), *map(state_checksum, others)}) == 6
    assert state_checksum(dict(reversed(state.items()))) == state_checksum(state)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x08" + bytes(7) + b"[1, 2, 3", b"\xff" * 16])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightStoreError, match="not a readable safetensors"):
        parse_state(content, where="x")
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(WeightStoreError):
        map_state(tmp_path / "x")


def test_tensors_that_reach_beyond_the_file_are_refused() -> None:
    content = save({"a": torch.zeros(8)})
    with pytest.raises(WeightStoreError, match="does not lie at bytes 0 to 32"):
        parse_state(content[:-1], where="x")

"""Writes weight versions as the trainer does, in bfloat16, and breaks them in all ways that a store can."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from shared.weights.patches import TensorPatch, encode_patches
from shared.weights.state import State, parse_state, state_checksum
from shared.weights.store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.shared.weights.states import find_patches

NORM = "model.norm.weight"


class Author:
    """Starts from a model's weights; `step` moves some of them."""

    def __init__(self, store: WeightStore, model: Path) -> None:
        self.store = store
        self.tensors = {
            name: tensor.to(torch.bfloat16) for name, tensor in load((model / FULL_FILE).read_bytes()).items()
        }
        self.checksums: dict[int, str] = {}
        self._version = 0
        self._published = self.state()

    def state(self) -> State:
        return parse_state(self.content(), where="author")

    def content(self) -> bytes:
        return save(self.tensors)

    def step(self, share: float = 0.1) -> None:
        """About `share` of all elements get a new value."""
        draw = torch.Generator().manual_seed(self._version)
        for tensor in self.tensors.values():
            chosen = torch.rand(tensor.shape, generator=draw) < share
            tensor[chosen] = (torch.randn(tensor.shape, generator=draw) * 0.2).to(torch.bfloat16)[chosen]

    def full(self, version: int, *, step: bool = True) -> None:
        if step:
            self.step()
        checksum = state_checksum(self.state())
        self.store.publish({FULL_FILE: self.content()}, version=version, step=version, state_checksum=checksum)
        self._note(version, checksum)

    def sparse(self, version: int) -> None:
        """What changed since the version before."""
        self.step()
        self.publish_changes(version, find_patches(self._published, self.state()))

    def sparse_damaged(self, version: int, change: Callable[[bytes], bytes | None]) -> None:
        """The same with its file changed, or deleted, after the manifest was written. Made elsewhere and moved to its
        place as a whole, so that no replica sees it undamaged."""
        store, self.store = self.store, WeightStore(f"{self.store.root}-elsewhere")
        self.sparse(version)
        file = self.file(version)
        damaged = change(file.read_bytes())
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        self.store = store
        file.parent.rename(self._folder(version))

    def publish_changes(
        self, version: int, patches: Sequence[TensorPatch], *, checksum: str = "", changed_checksum: str = ""
    ) -> None:
        checksum = checksum or state_checksum(self.state())
        files = {SPARSE_FILE: encode_patches(patches, self._published)}
        self.store.publish(
            files,
            version=version,
            step=version,
            base=self._version,
            state_checksum=checksum,
            changed_checksum=changed_checksum or checksum_of_changed(patches, self._published),
        )
        self._note(version, checksum)

    def file(self, version: int) -> Path:
        """Of a version in a folder, not at a URL."""
        (found,) = (path for path in self._folder(version).iterdir() if path.name in (FULL_FILE, SPARSE_FILE))
        return found

    def _folder(self, version: int) -> Path:
        return Path(self.store.root) / f"v{version:08d}"

    def _note(self, version: int, checksum: str) -> None:
        self.checksums[version] = checksum
        self._version, self._published = version, self.state()


def checksum_of_changed(patches: Sequence[TensorPatch], base: State) -> str:
    changed = [(base[patch.name].bits[patch.indices] + patch.changes).tobytes() for patch in patches]
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(b''.join(changed))}"


Breaking = Callable[[Author, int], None]
"""Publishes the given version, a sparse one, broken."""


def _damage(change: Callable[[bytes], bytes | None]) -> Breaking:
    """A sparse version whose file is changed, or deleted, after its manifest was written."""

    return lambda author, version: author.sparse_damaged(version, change)


def _forge(tensor: Callable[[Tensor], Tensor], name: str = NORM) -> Breaking:
    """A sparse version that is intact, but was made for another base than the one it names."""

    def break_it(author: Author, version: int) -> None:
        wrong = dict(author.tensors)
        wrong[name] = tensor(wrong[NORM])
        base = parse_state(save(wrong), where="forged")
        wrong[name] = wrong[name] + 1
        author._published = base
        author.publish_changes(version, find_patches(base, parse_state(save(wrong), where="forged")))

    return break_it


def _wrong_checksum(form: str) -> Breaking:
    def break_it(author: Author, version: int) -> None:
        author.step()
        patches = find_patches(author._published, author.state())
        author.publish_changes(version, patches, checksum=form + 32 * "0")

    return break_it


def _wrong_checksum_of_changed(author: Author, version: int) -> None:
    author.step()
    patches = find_patches(author._published, author.state())
    author.publish_changes(version, patches, changed_checksum="xxh3_128:" + 32 * "0")


def _not_finite(author: Author, version: int) -> None:
    author.tensors[NORM][0] = float("nan")
    author.publish_changes(version, find_patches(author._published, author.state()))
    author.tensors[NORM][0] = 1.0


def _without_manifest_of_its_base(author: Author, version: int) -> None:
    """The base is one that nobody has."""
    author._version = version - 1
    author.publish_changes(version, [TensorPatch(NORM, np.array([0]), np.array([1], np.uint16))])


BROKEN: dict[str, Breaking] = {
    "is corrupt": _damage(lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "is corrupt: 40 bytes": _damage(lambda content: content[:40]),
    "is corrupt: 0 bytes": _damage(lambda content: b""),
    "named in its manifest but missing": _damage(lambda content: None),
    "has shape (16,), the base's is (32,)": _forge(lambda norm: norm[:16].clone()),
    "has dtype F16, the base's is BF16": _forge(lambda norm: norm.to(torch.float16)),
    "has dtype F32, the base's is BF16": _forge(lambda norm: norm.to(torch.float32)),
    "the base has no tensor 'model.other.weight'": _forge(lambda norm: norm.clone(), "model.other.weight"),
    "its manifest says rows_1:0000": _wrong_checksum("rows_1:"),
    "its manifest says xxh3_128:0000": _wrong_checksum_of_changed,
    "written by another version of this program": _wrong_checksum("xxh3_128:"),
    "holds NaN": _not_finite,
    "rests on": _without_manifest_of_its_base,
}
"""By the words that the replica says of it."""

"""A version is complete and intact, or it is not there."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import FencedError, SettingsError, WeightStoreError
from shared.weights.store import MANIFEST, WeightStore, file_names

FILES = {"model.safetensors": b"weights", "extra.json": b"{}"}


def fetched(store: WeightStore, version: int, into: Path) -> dict[str, bytes]:
    store.fetch(store.manifest(version), into)
    return {path.name: path.read_bytes() for path in into.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(str(tmp_path / "store"))


def folder(store: WeightStore, version: int) -> Path:
    return Path(store.root) / f"v{version:08d}"


def test_what_is_published_can_be_fetched(store: WeightStore, tmp_path: Path) -> None:
    assert store.versions() == []
    store.publish(FILES, version=3, step=2)
    manifest = store.manifest(3)
    assert (manifest.version, manifest.step, manifest.form, manifest.num_bytes) == (3, 2, "full", 9)
    assert fetched(store, 3, tmp_path / "local") == FILES


def test_a_version_without_its_manifest_is_not_there(store: WeightStore, tmp_path: Path) -> None:
    store.publish(FILES, version=1, step=1)
    (folder(store, 1) / MANIFEST).unlink()
    assert store.versions() == []
    with pytest.raises(WeightStoreError, match="no complete weight version 1"):
        store.fetch(store.manifest(1), tmp_path / "local")


def test_a_version_is_never_overwritten(store: WeightStore) -> None:
    store.publish(FILES, version=1, step=1)
    with pytest.raises(WeightStoreError, match="versions only ascend"):
        store.publish(FILES, version=1, step=2)


def replaced() -> None:
    raise FencedError("another trainer has taken over the run")


def unknown() -> None:
    """Nobody has noticed that it was replaced."""


@pytest.mark.parametrize(("knows", "error"), [(replaced, FencedError), (unknown, WeightStoreError)])
def test_a_writer_that_was_replaced_takes_no_file_from_the_new_one(
    tmp_path: Path, knows: Callable[[], None], error: type[Exception]
) -> None:
    """It is frozen between its files and its manifest, the new one publishes the same version, and it wakes."""
    root = str(tmp_path / "store")
    new = WeightStore(root, writer=8)
    confirmations = iter([lambda: void(new.publish(FILES, version=1, step=2)), knows])
    stale = WeightStore(root, writer=7, confirm=lambda: next(confirmations)())
    with pytest.raises(error, match="another trainer"):
        stale.publish(dict.fromkeys(FILES, b"late"), version=1, step=1)
    assert stale.manifest(1).step == 2
    assert fetched(stale, 1, tmp_path / "local") == FILES
    names = sorted(path.name for path in folder(new, 1).iterdir())
    assert names == [f"{writer}.{name}" for writer in (7, 8) for name in sorted(FILES)] + [MANIFEST]


def void(_: object) -> None:
    """What a `confirm` returns."""


def test_without_its_lease_a_writer_leaves_no_manifest(tmp_path: Path) -> None:
    store = WeightStore(str(tmp_path), writer=7, confirm=replaced)
    with pytest.raises(FencedError):
        store.publish(FILES, version=1, step=1)
    assert store.versions() == []


def test_a_folder_without_hard_links_is_written_by_renaming(
    store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: str) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr("os.link", link)
    store.publish(FILES, version=1, step=1)
    assert fetched(store, 1, tmp_path / "local") == FILES
    assert sorted(path.name for path in folder(store, 1).iterdir()) == sorted([*FILES, MANIFEST])


def test_a_half_written_version_may_be_written_again(store: WeightStore, tmp_path: Path) -> None:
    folder(store, 1).mkdir(parents=True)
    (folder(store, 1) / "model.safetensors").write_bytes(b"half")
    store.publish(FILES, version=1, step=1)
    assert fetched(store, 1, tmp_path / "local") == FILES


@pytest.mark.parametrize("content", [b"weight", b"weighty", b"wEights"])
def test_a_corrupt_file_is_refused_and_leaves_nothing(store: WeightStore, tmp_path: Path, content: bytes) -> None:
    store.publish(FILES, version=1, step=1)
    (folder(store, 1) / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightStoreError, match="is corrupt"):
        store.fetch(store.manifest(1), tmp_path / "local")
    assert not (tmp_path / "local" / "model.safetensors").exists()


def test_a_missing_file_is_refused(store: WeightStore, tmp_path: Path) -> None:
    store.publish(FILES, version=1, step=1)
    (folder(store, 1) / "extra.json").unlink()
    with pytest.raises(WeightStoreError, match="named in its manifest but missing"):
        store.fetch(store.manifest(1), tmp_path / "local")


def test_a_manifest_that_leads_out_of_the_folder_is_refused(store: WeightStore, tmp_path: Path) -> None:
    store.publish(FILES, version=1, step=1)
    manifest = folder(store, 1) / MANIFEST
    manifest.write_text(manifest.read_text().replace("extra.json", "../../outside.json"))
    with pytest.raises(WeightStoreError, match="is not a manifest"):
        store.fetch(store.manifest(1), tmp_path / "local")


def test_pruning_keeps_the_newest(store: WeightStore) -> None:
    for version in range(5):
        store.publish(FILES, version=version, step=version)
    assert store.prune(keep=2) == [0, 1, 2]
    assert store.versions() == [3, 4]


def sparse(store: WeightStore, version: int, *, base: int, epoch: str = "") -> None:
    files = {"changes.zst": b"changes"}
    store.publish(files, version=version, step=version, epoch=epoch, base=base, state_checksum="sum")


def test_a_chain_leads_from_the_last_full_version(store: WeightStore) -> None:
    for version in (0, 3):
        store.publish(FILES, version=version, step=version)
    sparse(store, 4, base=3)
    sparse(store, 6, base=4)
    assert [link.version for link in store.chain(6)] == [3, 4, 6]
    assert [link.version for link in store.chain(6, known=4)] == [6]
    assert [link.version for link in store.chain(6, known=0)] == [3, 4, 6]
    assert store.chain(6, known=6) == []
    assert [link.version for link in store.chain(3)] == [3]


def test_a_chain_stays_in_its_epoch(store: WeightStore) -> None:
    store.publish(FILES, version=1, step=1, epoch="first")
    sparse(store, 2, base=1, epoch="second")
    with pytest.raises(WeightStoreError, match="version 2 rests on 1, which is of another epoch"):
        store.chain(2)


def test_pruning_keeps_what_a_kept_version_rests_on(store: WeightStore) -> None:
    for version in (0, 1):
        store.publish(FILES, version=version, step=version)
    for version in (2, 3, 4):
        sparse(store, version, base=version - 1)
    assert WeightStore(store.root).prune(keep=1) == [0]
    assert store.versions() == [1, 2, 3, 4]
    store.publish(FILES, version=5, step=5)
    assert store.prune(keep=1) == [1, 2, 3, 4]


def test_nothing_is_deleted_while_a_chain_cannot_be_read(store: WeightStore) -> None:
    for version in (0, 1):
        store.publish(FILES, version=version, step=version)
    sparse(store, 2, base=1)
    (folder(store, 2) / MANIFEST).write_text("{")
    with pytest.raises(WeightStoreError, match="is not a manifest"):
        WeightStore(store.root).prune(keep=1)
    assert store.versions() == [0, 1, 2]


def test_a_chain_with_a_missing_link_says_which(store: WeightStore) -> None:
    sparse(store, 2, base=1)
    with pytest.raises(WeightStoreError, match="version 2 rests on 1: no complete weight version 1"):
        store.chain(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "sparse"},
        {"form": "sparse", "base": 7, "state_checksum": "sum"},
        {"form": "sparse", "base": 3},
        {"base": 3},
        {"version": 8},
        {"form": "dense"},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(store: WeightStore, wrong: dict[str, object]) -> None:
    store.publish(FILES, version=7, step=7)
    manifest = folder(store, 7) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | wrong))
    with pytest.raises(WeightStoreError, match="manifest"):
        store.manifest(7)


def test_other_folders_are_no_versions(store: WeightStore) -> None:
    for name in ("v1", "notes"):
        (Path(store.root) / name).mkdir(parents=True)
    store.publish(FILES, version=2, step=0)
    assert store.versions() == [2]


@pytest.mark.parametrize("root", ["memory://weights-of-a-test", "dir::memory://chained/run"])
def test_any_file_system_of_fsspec_serves(tmp_path: Path, root: str) -> None:
    store = WeightStore(root)
    store.publish(FILES, version=0, step=0)
    assert store.versions() == [0]
    assert fetched(store, 0, tmp_path / "local") == FILES


@pytest.mark.parametrize("root", ["s3://id:hUsh@bucket/run", "s3://bucket/run?token=hUsh", "memory://run#hUsh"])
def test_a_key_that_would_become_part_of_the_path_is_refused(root: str) -> None:
    """The file system would repeat it in its errors without the rest of the URL."""
    with pytest.raises(SettingsError, match="takes no keys or options") as caught:
        WeightStore(root)
    assert "hUsh" not in str(caught.value)


def test_a_version_is_written_file_by_file_as_it_comes(store: WeightStore, tmp_path: Path) -> None:
    writer = store.begin(4, step=3)
    blocks: list[bytes | bytearray | memoryview] = [b"one ", bytearray(b"two "), memoryview(b"three")]
    writer.write("a", iter(blocks))
    assert store.versions() == []
    writer.write("b", iter([]))
    manifest = writer.finish(state_checksum="sum")
    assert store.manifest(4) == manifest
    assert [(file.name, file.num_bytes) for file in manifest.files] == [("a", 13), ("b", 0)]
    assert fetched(store, 4, tmp_path / "local") == {"a": b"one two three", "b": b""}


def test_an_error_of_what_is_written_travels_as_it_is(store: WeightStore) -> None:
    """It is no outage of the store, which would be waited out."""
    with pytest.raises(ZeroDivisionError):
        store.begin(4, step=3).write("a", (bytes([1 // number]) for number in (1, 0)))
    assert store.versions() == []


def test_files_are_numbered_where_there_are_several() -> None:
    assert file_names("model.safetensors", 1) == ["model.safetensors"]
    assert file_names("changes.zst", 2) == ["changes-00001-of-00002.zst", "changes-00002-of-00002.zst"]

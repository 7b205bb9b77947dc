"""The weight store on an S3-compatible object store: a moto server in this process, reached through s3fs."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from shared.errors import SettingsError, WeightStoreError
from shared.weights.store import FULL_FILE, MANIFEST, SPARSE_FILE, Manifest, WeightStore

FULL, CHANGES = {FULL_FILE: bytearray(b"weights")}, {SPARSE_FILE: b"changes"}  # as the trainer gives them


SECOND: dict[str, Any] = {"version": 0, "step": 2}


@pytest.fixture
def store(s3: Any) -> WeightStore:
    return WeightStore("s3://weights/run")


def test_versions_are_published_fetched_and_pruned(store: WeightStore, tmp_path: Path) -> None:
    assert store.versions() == []
    store.publish(FULL, version=0, step=0)
    store.publish(FULL, version=1, step=1)
    store.publish(CHANGES, version=2, step=2, base=1, state_checksum="sum")
    reader = WeightStore("s3://weights/run")
    assert reader.versions() == [0, 1, 2]
    assert [link.version for link in reader.chain(2)] == [1, 2]
    for link in reader.chain(2):
        reader.fetch(link, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FULL | CHANGES
    assert store.prune(keep=1) == [0]
    assert reader.versions() == [1, 2]
    assert not fsspec.filesystem("s3").find("weights/run/v00000000", refresh=True)


def test_a_manifest_appears_at_once_under_its_own_name(store: WeightStore, s3: Any) -> None:
    """Renaming would be a copy and a deletion there; a put of one object is atomic as it is."""
    store.publish(FULL, version=0, step=0)
    names = fsspec.filesystem("s3").find("weights/run")
    assert names == [f"weights/run/v00000000/{MANIFEST}", f"weights/run/v00000000/{FULL_FILE}"]


def test_a_manifest_is_created_and_never_replaced(store: WeightStore, s3: Any, tmp_path: Path) -> None:
    """By a condition of the put itself: the writer has looked before another one published the same version."""
    new = WeightStore("s3://weights/run", writer=8)
    published: list[Manifest] = []

    def confirm() -> None:
        if not published:
            published.append(new.publish(FULL, **SECOND))

    stale = WeightStore("s3://weights/run", writer=7, confirm=confirm)
    with pytest.raises(WeightStoreError, match="another trainer published it"):
        stale.publish({FULL_FILE: b"late"}, version=0, step=1)
    assert [store.manifest(0)] == published
    store.fetch(store.manifest(0), tmp_path)
    assert (tmp_path / FULL_FILE).read_bytes() == FULL[FULL_FILE]


def test_a_corrupt_object_is_refused(store: WeightStore, tmp_path: Path) -> None:
    store.publish(FULL, version=0, step=0)
    fsspec.filesystem("s3").pipe_file(f"weights/run/v00000000/{FULL_FILE}", b"weighty")
    with pytest.raises(WeightStoreError, match="is corrupt"):
        store.fetch(store.manifest(0), tmp_path)
    fsspec.filesystem("s3").rm_file(f"weights/run/v00000000/{FULL_FILE}")
    with pytest.raises(WeightStoreError, match="missing"):
        store.fetch(store.manifest(0), tmp_path)


def test_a_bucket_that_is_not_there_is_an_os_error(s3: Any) -> None:
    store = WeightStore("s3://nowhere/run")
    assert store.versions() == []
    with pytest.raises(OSError, match="bucket"):
        store.publish(FULL, version=0, step=0)


def test_a_server_that_is_away_is_an_os_error(store: WeightStore, s3: Any) -> None:
    """What trainer and replica know how to treat; the library has its own family of errors."""
    s3.stop()
    for call in (store.versions, lambda: store.manifest(0), lambda: store.publish(FULL, version=0, step=0)):
        with pytest.raises(OSError, match="onnect"):
            call()


def test_a_protocol_that_nothing_serves_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"weights\.store 'nonsense://x'"):
        WeightStore("nonsense://x")

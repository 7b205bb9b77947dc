"""The weight store: numbered versions of the policy in a folder or at an fsspec URL.

    v00000012/7.model.safetensors   full: every tensor, in the dtype that replicas serve
    v00000013/7.changes.zst         sparse: what changed since the base that its manifest names
    v00000013/manifest.json         written last: if it is there, the version is complete

Large versions have several files, such as 7.model-00001-of-00003.safetensors or 7.changes-00001-of-00002.zst, in the
order of the manifest.

The trainer is the only writer, and its lease has the number 7. One that was replaced without knowing it, and writes the
same version, has another number and so overwrites no file; a manifest is only ever created. Versions only ascend, also
after a resume from an older checkpoint. A sparse version rests on its base and so, link by link, on a full one: `chain`
lists them.

Numbers are comparable within one *epoch* only. A trainer that can't continue from what was announced, because the store
or Redis was wiped or restored, begins a new one (trainer/publisher.py).
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError, model_validator

from shared.errors import HeadwaterError, SettingsError, WeightStoreError
from shared.records import Record
from shared.secret_urls import without_secrets

MANIFEST = "manifest.json"
FULL_FILE = "model.safetensors"
SPARSE_FILE = "changes.zst"

Buffer = bytes | bytearray | memoryview
_BLOCK_BYTES = 8 << 20
"""Written and hashed at once."""
_VERSION_FOLDER = re.compile(r"^v(\d{8})$")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "r2", "memory"})
"""Here putting an object is atomic, and renaming one is a copy followed by a deletion."""
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class WeightFile(Record):
    name: _FileName
    """What the reader gets."""
    num_bytes: int
    sha256: str
    stored_as: _FileName | None = None
    """Its name in the version's folder; None: `name`."""


class Manifest(Record):
    version: int = Field(ge=0)
    epoch: str = ""
    """Empty in stores older than epochs."""
    step: int = Field(ge=0)
    """The update that the version belongs to."""
    form: Literal["full", "sparse"] = "full"
    base: int | None = None
    """Sparse: the version that the changes apply to."""
    state_checksum: str = ""
    """Of all tensors, after the changes (state.py). Sparse versions always have one."""
    changed_checksum: str = ""
    """Sparse: of the changed elements alone, after the changes (patches.py)."""
    files: tuple[WeightFile, ...]
    created_at: float

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @model_validator(mode="after")
    def _form_is_whole(self) -> Self:
        if self.form == "full" and self.base is not None:
            raise ValueError("a full version has no base")
        if self.form == "sparse" and (self.base is None or self.base >= self.version or not self.state_checksum):
            raise ValueError("a sparse version needs a base with a lower number and a state_checksum")
        return self


@contextmanager
def _translated() -> Iterator[None]:
    """Turns other errors of a file system's library into OSError."""
    try:
        yield
    except (OSError, HeadwaterError):
        raise
    except Exception as exc:
        raise OSError(f"{type(exc).__name__}: {exc}") from exc


class WeightStore:
    """Versions under one root. `root` is a folder or any fsspec URL. One thread at a time.

    To publish give the number of the trainer's lease as `writer`, and a `confirm` that raises FencedError once another
    trainer has taken over.
    """

    def __init__(self, root: str, *, writer: int | None = None, confirm: Callable[[], None] = lambda: None) -> None:
        self._writer, self._confirm = writer, confirm
        try:
            self._fs, self._root = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as exc:
            raise SettingsError(f"weights.store {root!r} can't be opened: {exc} (S3: headwater[s3])") from exc
        self.root = without_secrets(root)
        if self.root != root and type(self._fs)._strip_protocol(self.root) != self._root:
            raise SettingsError(
                f"weights.store {self.root} takes no keys or options in its URL, they would become part of the path: "
                "give them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        protocol = self._fs.protocol
        self._puts_are_atomic = not _OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._known: dict[int, Manifest] = {}
        """Manifests seen before; they never change."""

    def publish(
        self,
        files: Mapping[str, Buffer],
        *,
        version: int,
        step: int,
        epoch: str = "",
        base: int | None = None,
        state_checksum: str = "",
        changed_checksum: str = "",
    ) -> Manifest:
        """Write a version whose files are in memory; sparse if there is a `base`. Raises as `begin`."""
        writer = self.begin(version, step=step, epoch=epoch, base=base)
        for name, content in files.items():
            writer.write(name, [content])
        return writer.finish(state_checksum=state_checksum, changed_checksum=changed_checksum)

    @_translated()
    def begin(self, version: int, *, step: int, epoch: str = "", base: int | None = None) -> "VersionWriter":
        """A version in the making; sparse if there is a `base`. WeightStoreError if the version exists."""
        folder = self._folder(version)
        if self._fs.exists(f"{folder}/{MANIFEST}"):
            raise WeightStoreError(f"weight version {version} is already in {self.root}: versions only ascend")
        if not self._puts_are_atomic:
            self._fs.makedirs(folder, exist_ok=True)
        return VersionWriter(self, version, step=step, epoch=epoch, base=base)

    def _write_file(self, path: str, blocks: Iterable[Buffer]) -> tuple[int, str]:
        """Bytes and sha256 of a file that is hashed while it is written. Errors of `blocks` travel as they are."""
        digest, num_bytes = hashlib.sha256(), 0
        with _translated():
            opened = self._fs.open(path, "wb")
        try:
            for block in blocks:
                for piece in _pieces(block):
                    with _translated():
                        opened.write(piece)
                    digest.update(piece)
                    num_bytes += len(piece)
        finally:
            with _translated():
                opened.close()
        return num_bytes, digest.hexdigest()

    @_translated()
    def _finish(self, manifest: Manifest) -> None:
        self._confirm()
        try:
            self._create_manifest(self._folder(manifest.version), manifest)
        except (OSError, WeightStoreError):
            self._confirm()  # else a new trainer has published this version, or deleted its folder
            raise
        self._known[manifest.version] = manifest

    @_translated()
    def versions(self) -> list[int]:
        """Complete versions, ascending."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))
        found = (int(match[1]) for name in names if (match := _VERSION_FOLDER.match(name)))
        return sorted(version for version in found if self._fs.exists(f"{self._folder(version)}/{MANIFEST}"))

    @_translated()
    def manifest(self, version: int) -> Manifest:
        path = f"{self._folder(version)}/{MANIFEST}"
        try:
            found = Manifest.model_validate(json.loads(self._fs.cat_file(path)))
        except FileNotFoundError as exc:
            raise WeightStoreError(f"no complete weight version {version} in {self.root}") from exc
        except (ValueError, ValidationError) as exc:
            raise WeightStoreError(f"{path} is not a manifest: {exc}") from exc
        if found.version != version:
            raise WeightStoreError(f"{path} is the manifest of version {found.version}")
        return found

    def chain(self, version: int, *, known: int | None = None) -> list[Manifest]:
        """The versions to apply in order to get `version`: from the last full one, or those after `known` (same epoch).
        WeightStoreError if a manifest among them is missing, unreadable or of another epoch."""
        links: list[Manifest] = []
        wanted: int | None = version
        while wanted is not None and wanted != known:
            try:
                links.append(self.manifest(wanted))
            except WeightStoreError as exc:
                raise exc if not links else WeightStoreError(f"version {version} rests on {wanted}: {exc}") from exc
            if links[-1].epoch != links[0].epoch:
                raise WeightStoreError(f"version {version} rests on {wanted}, which is of another epoch")
            wanted = links[-1].base
        return links[::-1]

    @_translated()
    def fetch(self, manifest: Manifest, into: Path) -> None:
        """Copy a version's files. WeightStoreError at the first that is missing, or corrupt: this one is deleted."""
        into.mkdir(parents=True, exist_ok=True)
        for file in manifest.files:
            stored_as = file.stored_as or file.name
            self._fetch_file(file, f"{self._folder(manifest.version)}/{stored_as}", into / file.name)

    @_translated()
    def prune(self, *, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions and what they rest on; returns the deleted ones. WeightStoreError,
        and nothing is deleted, if a kept version's chain can't be read."""
        present = self.versions()
        needed = self._needed(present[-keep:])
        gone = [version for version in present if version not in needed]
        for version in gone:
            self.delete(version)
        return gone

    @_translated()
    def delete(self, version: int) -> None:
        """The manifest goes first, so that a half-deleted version never looks complete."""
        self._known.pop(version, None)
        self._fs.rm_file(f"{self._folder(version)}/{MANIFEST}")
        self._fs.rm(self._folder(version), recursive=True)

    def _needed(self, kept: Iterable[int]) -> set[int]:
        needed: set[int] = set()
        for version in kept:
            wanted: int | None = version
            while wanted is not None and wanted not in needed:
                needed.add(wanted)
                if wanted not in self._known:
                    self._known[wanted] = self.manifest(wanted)
                wanted = self._known[wanted].base
        return needed

    def _fetch_file(self, file: WeightFile, path: str, target: Path) -> None:
        try:
            self._fs.get_file(path, str(target))
        except FileNotFoundError as exc:
            raise WeightStoreError(f"{path} is named in its manifest but missing") from exc
        with target.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        num_bytes = target.stat().st_size
        if num_bytes != file.num_bytes or digest != file.sha256:
            target.unlink()
            expected = f"{file.num_bytes} with sha256 {file.sha256[:12]}"
            raise WeightStoreError(f"{path} is corrupt: {num_bytes} bytes, expected {expected}")

    def has_written(self, manifest: Manifest) -> bool:
        """Whether this writer did, and not another trainer."""
        return all(file.stored_as == self._stored_as(file.name) for file in manifest.files)

    def _stored_as(self, name: str) -> str:
        return name if self._writer is None else f"{self._writer}.{name}"

    def _create_manifest(self, folder: str, manifest: Manifest) -> None:
        """WeightStoreError if there is one. Readers see all or nothing. Not synced: checksums show what a crash lost, a
        start writes a full version."""
        path, content = f"{folder}/{MANIFEST}", manifest.model_dump_json(indent=2).encode()
        try:
            if self._puts_are_atomic:
                self._create_object(path, content)
            else:
                self._create_file(path, content)
        except FileExistsError as exc:
            if self._fs.cat_file(path) != content:  # ours: the answer to the first attempt was lost
                message = f"weight version {manifest.version} is already in {self.root}: another trainer published it"
                raise WeightStoreError(message) from exc

    def _create_file(self, path: str, content: bytes) -> None:
        written = f"{path}.{self._writer}.tmp"
        self._fs.pipe_file(written, content)
        try:
            if self._linked(written, path):
                self._fs.rm_file(written)
            elif self._fs.exists(path):
                raise FileExistsError(path)
            else:
                self._fs.mv(written, path)
        except FileExistsError:
            self._fs.rm_file(written)
            raise

    def _linked(self, written: str, path: str) -> bool:
        """A link, unlike a rename, does not replace. False where there are none: some mounts, and remote folders."""
        if not isinstance(self._fs, LocalFileSystem):
            return False
        try:
            os.link(written, path)
        except OSError as exc:
            if exc.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                return False
            raise
        return True

    def _create_object(self, path: str, content: bytes) -> None:
        """S3, Google and Azure create an object only if it is absent, in one operation."""
        try:
            self._fs.pipe_file(path, content, mode="create")
        except OSError as exc:
            answer = getattr(exc.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") != "NotImplemented":
                raise
            self._fs.pipe_file(path, content)  # an S3-compatible store without conditional writes

    def _folder(self, version: int) -> str:
        return f"{self._root}/v{version:08d}"


class VersionWriter:
    """A version in the making: files, then `finish`. Until then readers don't see it. Raises OSError."""

    def __init__(self, store: WeightStore, version: int, *, step: int, epoch: str, base: int | None) -> None:
        self._store, self._version, self._step, self._epoch, self._base = store, version, step, epoch, base
        self._files: list[WeightFile] = []

    def write(self, name: str, blocks: Iterable[Buffer]) -> None:
        """One file, as it comes: nothing of its size is held in memory."""
        stored_as = self._store._stored_as(name)
        num_bytes, sha256 = self._store._write_file(f"{self._store._folder(self._version)}/{stored_as}", blocks)
        self._files.append(WeightFile(name=name, num_bytes=num_bytes, sha256=sha256, stored_as=stored_as))

    def finish(self, *, state_checksum: str = "", changed_checksum: str = "") -> Manifest:
        """Write the manifest: now the version is there. FencedError if another trainer has taken over."""
        manifest = Manifest(
            version=self._version,
            epoch=self._epoch,
            step=self._step,
            form="full" if self._base is None else "sparse",
            base=self._base,
            state_checksum=state_checksum,
            changed_checksum=changed_checksum,
            files=tuple(self._files),
            created_at=time.time(),
        )
        self._store._finish(manifest)
        return manifest


def _pieces(block: Buffer) -> Iterator[memoryview]:
    content = memoryview(block).cast("B")
    for start in range(0, len(content), _BLOCK_BYTES):
        yield content[start : start + _BLOCK_BYTES]


def file_names(name: str, count: int) -> list[str]:
    """model.safetensors, or model-00001-of-00002.safetensors, model-00002-of-00002.safetensors."""
    stem, suffix = name.split(".", 1)
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]

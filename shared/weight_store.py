"""The weight store: numbered versions of the policy in a folder or at an fsspec URL.

    v00000012/model.safetensors   written first
    v00000012/manifest.json       written last: its presence means that the version is complete

The trainer is the only writer. Readers fetch into a local folder and compare checksums before they let an engine
touch a file. Versions only ever ascend, also after a resume from an older checkpoint; `step` says which update
a version belongs to.
"""

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import fsspec
from pydantic import Field, ValidationError

from shared.errors import WeightStoreError
from shared.records import Record

MANIFEST = "manifest.json"
_VERSION_FOLDER = re.compile(r"^v(\d{8})$")


class WeightFile(Record):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    num_bytes: int
    sha256: str


class Manifest(Record):
    """What one version consists of."""

    version: int = Field(ge=0)
    step: int = Field(ge=0)
    form: Literal["full"] = "full"
    files: tuple[WeightFile, ...]
    created_at: float

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


class WeightStore:
    """Versions under one root. `root` is a folder or any fsspec URL."""

    def __init__(self, root: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(root)
        self.root = root

    def publish(self, files: dict[str, bytes], *, version: int, step: int) -> Manifest:
        """Write all files, then the manifest. Raises WeightStoreError if the version is there already."""
        folder = self._folder(version)
        if self._fs.exists(f"{folder}/{MANIFEST}"):
            raise WeightStoreError(f"weight version {version} already lies in {self.root}: versions only ascend")
        self._fs.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            self._fs.pipe_file(f"{folder}/{name}", content)
        manifest = Manifest(
            version=version,
            step=step,
            files=tuple(
                WeightFile(name=name, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
                for name, content in files.items()
            ),
            created_at=time.time(),
        )
        temporary = f"{folder}/{MANIFEST}.tmp"
        self._fs.pipe_file(temporary, manifest.model_dump_json(indent=2).encode())
        self._fs.mv(temporary, f"{folder}/{MANIFEST}")
        return manifest

    def versions(self) -> list[int]:
        """Complete versions, ascending."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))
        found = (int(match[1]) for name in names if (match := _VERSION_FOLDER.match(name)))
        return sorted(version for version in found if self._fs.exists(f"{self._folder(version)}/{MANIFEST}"))

    def manifest(self, version: int) -> Manifest:
        path = f"{self._folder(version)}/{MANIFEST}"
        try:
            return Manifest.model_validate(json.loads(self._fs.cat_file(path)))
        except FileNotFoundError as exc:
            raise WeightStoreError(f"no complete weight version {version} in {self.root}") from exc
        except (ValueError, ValidationError) as exc:
            raise WeightStoreError(f"{path} is not a manifest: {exc}") from exc

    def fetch(self, version: int, into: Path) -> Manifest:
        """Copy a version into the folder `into/vNNNNNNNN`, checksums compared; nothing stays there on failure."""
        manifest = self.manifest(version)
        target = into / f"v{version:08d}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            for file in manifest.files:
                self._fetch_file(file, f"{self._folder(version)}/{file.name}", target / file.name)
        except WeightStoreError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return manifest

    def prune(self, *, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions, manifests first so that no half version looks complete."""
        gone = self.versions()[:-keep]
        for version in gone:
            self._fs.rm_file(f"{self._folder(version)}/{MANIFEST}")
            self._fs.rm(self._folder(version), recursive=True)
        return gone

    def _fetch_file(self, file: WeightFile, path: str, target: Path) -> None:
        try:
            content = self._fs.cat_file(path)
        except FileNotFoundError as exc:
            raise WeightStoreError(f"{path} is named in its manifest but missing") from exc
        if len(content) != file.num_bytes or hashlib.sha256(content).hexdigest() != file.sha256:
            raise WeightStoreError(
                f"{path} is corrupt: {len(content)} bytes, expected {file.num_bytes} with sha256 {file.sha256[:12]}"
            )
        target.write_bytes(content)

    def _folder(self, version: int) -> str:
        return f"{self._root}/v{version:08d}"

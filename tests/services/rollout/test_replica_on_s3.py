"""A replica whose weight store is an S3 bucket that comes and goes: a moto server in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import httpx
import torch

from services.engine.hf.engine import TransformersEngine
from services.rollout.app import build_app
from shared.engine_settings import EngineSettings
from shared.settings import Settings
from shared.weights.store import SPARSE_FILE, WeightStore
from tests.services.rollout.author import Author
from tests.services.rollout.conftest import SECRETS, make_settings
from tests.services.serving import running, wait_until

STORE = "s3://weights/run"


def settings_of(model: Path, folder: Path) -> Settings:
    settings = make_settings(model, folder, replica="a")
    return settings.model_copy(update={"weights": settings.weights.model_copy(update={"store": STORE})})


@contextmanager
def replica(model: Path, folder: Path) -> Iterator[tuple[str, TransformersEngine]]:
    engine = TransformersEngine(EngineSettings(model=str(model), device="cpu"))
    with running(build_app(settings_of(model, folder), SECRETS, engine=engine)) as url:
        yield url, engine


def readiness(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/readyz", timeout=5).json()
    return found


def test_full_and_sparse_versions_come_from_a_bucket_and_a_broken_one_does_not(
    s3: Any, tiny_model: Path, tmp_path: Path
) -> None:
    author = Author(WeightStore(STORE), tiny_model)
    with replica(tiny_model, tmp_path) as (url, engine):
        author.full(1)
        author.sparse(2)
        wait_until(lambda: readiness(url)["weight_version"] == 2, what="version 2")
        author.sparse(3)
        wait_until(lambda: readiness(url)["weight_version"] == 3, what="version 3")
        own = engine._started.module.state_dict()
        assert all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in author.tensors.items())
        fsspec.filesystem("s3").pipe_file(f"weights/run/v00000004/{SPARSE_FILE}", b"half")
        assert readiness(url)["weight_version"] == 3  # no manifest: it is not there
        s3.stop()
        wait_until(lambda: "can't look for new weights" in readiness(url)["detail"], what="the detail")
        assert readiness(url)["ready"]

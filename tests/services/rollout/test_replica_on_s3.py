"""A replica whose weight store is an S3 bucket that comes and goes: a moto server in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from services.rollout.app import build_app
from shared.settings import Settings
from shared.weight_state import map_state, state_checksum
from shared.weight_store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.services.rollout.author import Author
from tests.services.rollout.conftest import SECRETS, make_settings
from tests.services.serving import running, wait_until

STORE = "s3://weights/run"


def settings_of(model: Path, folder: Path) -> Settings:
    settings = make_settings(model, folder, replica="a")
    return settings.model_copy(update={"weights": settings.weights.model_copy(update={"store": STORE})})


@contextmanager
def replica(model: Path, folder: Path) -> Iterator[str]:
    with running(build_app(settings_of(model, folder), SECRETS)) as url:
        yield url


def readiness(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/readyz", timeout=5).json()
    return found


def test_full_and_sparse_versions_come_from_a_bucket_and_a_broken_one_does_not(
    s3: Any, tiny_model: Path, tmp_path: Path
) -> None:
    author = Author(WeightStore(STORE), tiny_model)
    with replica(tiny_model, tmp_path) as url:
        author.full(1)
        author.sparse(2)
        wait_until(lambda: readiness(url)["policy_version"] == 2, what="version 2")
        author.sparse(3)
        wait_until(lambda: readiness(url)["policy_version"] == 3, what="version 3")
        (copy,) = (tmp_path / "test/replicas/a").glob(f"v00000003/{FULL_FILE}")
        assert state_checksum(map_state(copy)) == author.checksums[3]
        WeightStore(STORE)._fs.pipe_file(f"weights/run/v00000004/{SPARSE_FILE}", b"half")
        assert readiness(url)["policy_version"] == 3  # no manifest: it is not there
        s3.stop()
        wait_until(lambda: "can't be heard of" in readiness(url)["detail"], what="the detail")
        assert readiness(url)["ready"]

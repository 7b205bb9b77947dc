"""The rollout service as a whole: a tiny policy, a weight store, a real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.rollout.app import build_app
from shared import metrics
from shared.database import EventRow, open_database, transaction
from shared.settings import Secrets, Settings
from tests.services.conftest import build_tiny_model
from tests.services.serving import running

TOKEN = "t0ken"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SECRETS = Secrets(token=TOKEN)


def make_settings(model: Path, folder: Path, **rollout: object) -> Settings:
    """No Redis: the newest version in the store counts as announced."""
    return Settings.model_validate(
        {
            "run": {"name": "test", "directory": str(folder)},
            "policy": {"model": str(model)},
            "rollout": {"poll_interval_s": 0.02, "engine": {"device": "cpu"}} | rollout,
        }
    )


def events_of(folder: Path) -> list[tuple[str, object]]:
    """Kind and weight version of every event of the run in `folder`."""
    database = open_database(make_settings(Path("unused"), folder).database_url)
    with transaction(database) as session:
        return [(kind, data["version"]) for kind, data in session.execute(sa.select(EventRow.kind, EventRow.data))]


def counted(name: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"headwater_{name}_total") or 0.0


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A safetensors file that fits the tiny model, with other values."""
    folder = tmp_path_factory.mktemp("other") / "model"
    build_tiny_model(folder, seed=1)
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A rollout service that nobody sends weights to."""
    with running(build_app(make_settings(tiny_model, tmp_path_factory.mktemp("run")), SECRETS)) as url:
        yield url

"""Real stores: a Redis server, and each database test once on SQLite and once on PostgreSQL."""

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from shared.database import migrate, open_database
from shared.redis import connect
from tests.services.collector.processes import RedisProcess

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server from the pgserver package. As root it runs as a user `pgserver`, which it makes: its folder
    must then lie where that user may go, so not under pytest's private one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is unset
        import pgserver

    folder = Path(tempfile.mkdtemp(prefix="headwater-pg-"))
    server: Any = pgserver.get_server(folder, cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of its own for each test."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'headwater.db'}"
    server = str(request.getfixturevalue("postgres_url"))
    name = f"test_{next(_numbers)}"
    admin = open_database(server).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def database(database_url: str) -> Iterator[sa.Engine]:
    """Migrated."""
    opened = open_database(database_url)
    migrate(opened)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(redis_server: RedisProcess) -> Iterator[redis.Redis]:
    """An empty Redis."""
    made = connect(redis_server.url, timeout_s=2)
    made.flushall()
    yield made
    made.close()


@pytest.fixture
def run() -> str:
    return f"run-{next(_numbers)}"

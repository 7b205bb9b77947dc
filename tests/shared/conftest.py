"""Real stores: a Redis server, and each database test once on SQLite and once on PostgreSQL (tests/conftest.py)."""

import itertools
from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import Engine

from shared.database import migrate, open_database
from shared.stream import connect
from tests.services.collector.processes import RedisProcess

_numbers = itertools.count()


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """Migrated."""
    engine = open_database(database_url)
    migrate(engine)
    yield engine
    engine.dispose()


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

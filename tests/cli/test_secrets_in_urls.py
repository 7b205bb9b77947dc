"""A whole run with a secret in every part of every URL that it is given: nothing that it leaves behind has one."""

import json
import re
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shared.database import open_database
from tests.cli.launched import Recipe, write_model
from tests.services.collector.processes import RedisProcess, served
from tests.services.collector.stub_services import StubServices
from tests.shared.conftest import database_url, postgres_url

__all__ = ["database_url", "postgres_url"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MARK = "hUsh"
SCHEDULE = '[{"kinds": ["original", "rewrite"], "num_rollouts": 0}]'


class TalkativeServices:
    """An endpoint for the rewriter, and a judge. Each fails a few times first, and then says whom it was asked by which
    URL, as servers and proxies do."""

    def __init__(self) -> None:
        self.failures = {"endpoint": 3, "judge": 3}
        self.keys: set[str] = set()
        """What was sent as authorization."""

    @property
    def app(self) -> Starlette:
        judge = StubServices().app
        routes = [Route("/v1/models", self._models), Route("/v1/chat/completions", self._chat, methods=["POST"])]
        (judging,) = (route for route in judge.routes if isinstance(route, Route) and route.path == "/v1/judgements")
        self._judging = judging.endpoint
        return Starlette(routes=[*routes, Route("/v1/judgements", self._judge, methods=["POST"])])

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "teacher"}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "green light"}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "teacher", "choices": [choice]}
        is_probe = "seed" not in body
        return (None if is_probe else self._failed("endpoint", request)) or JSONResponse(answer)

    async def _judge(self, request: Request) -> Response:
        failed = self._failed("judge", request)
        if failed is not None:
            return failed
        answer: Response = await self._judging(request)
        return answer

    def _failed(self, name: str, request: Request) -> Response | None:
        self.keys.add(request.headers.get("authorization", ""))
        if not self.failures[name]:
            return None
        self.failures[name] -= 1
        asked = str(request.url).replace("http://", f"http://me:{MARK}-said@") + f"?key={MARK}-said"
        return JSONResponse({"error": {"message": f"no upstream for '{asked}'"}}, status_code=503)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    lines = [json.dumps({"text": " ".join(["the sea a hill of old stone and green light"] * 6)}) for _ in range(60)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_model(tmp_path)
    return Recipe(tmp_path)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisProcess]:
    folder = tmp_path / "redis-server"
    folder.mkdir()
    server = RedisProcess(folder)
    server.start()
    client = redis.Redis(port=server.port)
    client.config_set("requirepass", f"{MARK}-redis")
    client.close()
    yield server
    server.stop()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_run_leaves_no_secret_of_its_urls_anywhere(
    recipe: Recipe, redis_server: RedisProcess, database_url: str
) -> None:
    services = TalkativeServices()
    with served(services.app) as url:
        options = urls_with_secrets(redis_server.url, database_url, url)
        with recipe.launch("--trainer.steps", "3", *options) as run, listening(run.recipe.run_folder) as heard:
            assert run.finish() == 0, run.output
    assert steps_in(database_url) == [1, 2, 3]
    assert any(MARK not in key for key in services.keys)  # the answers
    assert set(services.failures.values()) == {0}  # the errors that repeat URLs were made
    left = {str(path): path.read_bytes().decode("utf-8", "replace") for path in files_of(recipe.run_folder)}
    left |= tables_of(database_url) | heard | {"output": run.output}
    assert {"settings.toml", "processes.toml", "report.md", "collector.log"} <= {Path(name).name for name in left}
    assert {"table runs", "table events", "/readyz of the collector", "/readyz of the rewriter"} <= left.keys()
    assert {name: found for name, text in left.items() if (found := re.findall(rf".*{MARK}.*", text)[:3])} == {}


def urls_with_secrets(redis: str, database: str, services: str) -> list[str]:
    services = services.replace("http://", f"http://me:{MARK}-service@")
    database = database.replace("postgres:@", f"postgres:{MARK}-database@")
    return [
        "--redis.url", f"{redis}/0?password={MARK}-redis&db=0#{MARK}-redis-fragment",
        "--database.url", f"{database}&sslpassword={MARK}-database-option",
        "--rewriter.engine.kind", "openai", "--rewriter.engine.model", "teacher", "--rewriter.bridge_words", "0",
        "--rewriter.engine.endpoint", f"{services}/v1#{MARK}-endpoint-fragment",
        "--judge.url", services,
        "--documents.subset", f"https://me:{MARK}-subset@host/?sig={MARK}",
        "--collector.schedule", SCHEDULE, "--collector.max_backoff_s", "0.5",
    ]  # fmt: skip


@contextmanager
def listening(folder: Path) -> Iterator[dict[str, str]]:
    """What the open routes of a run's processes answer meanwhile, by role."""
    heard: dict[str, str] = {}
    ended = threading.Event()
    thread = threading.Thread(target=_listen, args=(folder, heard, ended))
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        thread.join()


def _listen(folder: Path, heard: dict[str, str], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        file = folder / "processes.toml"
        if not file.exists():
            continue
        settings = tomllib.loads(file.read_text())
        for role, path in (("collector", "/readyz"), ("rewriter", "/readyz"), ("rewriter", "/healthz")):
            try:
                answer = httpx.get(f"http://127.0.0.1:{settings[role]['port']}{path}", timeout=5).text
            except httpx.TransportError:
                continue
            name = f"{path} of the {role}"
            if answer not in heard.get(name, ""):
                heard[name] = f"{heard.get(name, '')}{answer}\n"


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def steps_in(database: str) -> list[int]:
    return sorted(int(row.split("\t")[1]) for row in tables_of(database)["table steps"].splitlines())


def tables_of(database: str) -> dict[str, str]:
    """Every table's rows as text."""
    engine = open_database(database)
    with engine.connect() as connection:
        names = sa.inspect(engine).get_table_names()
        rows = {name: connection.execute(sa.text(f'SELECT * FROM "{name}"')).all() for name in names}
    engine.dispose()
    return {f"table {name}": "\n".join("\t".join(map(str, row)) for row in found) for name, found in rows.items()}

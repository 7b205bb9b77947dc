"""Health, readiness and metrics of a running collector."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from starlette.responses import Response

from shared.settings import Secrets, Settings
from tests.services.collector.processes import free_port, served
from tests.services.collector.runs import collecting, until
from tests.services.collector.stub_services import StubServices

MakeSettings = Callable[..., Settings]


def test_readiness_names_the_service_that_is_away_and_metrics_need_the_token(make_settings: MakeSettings) -> None:
    def away(path: str, body: Any) -> Response | None:
        return Response(status_code=503) if path == "/v1/judgements" and down else None

    down, port = True, free_port()
    base, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer word"}

    def ready() -> tuple[int, str]:
        try:
            answer = httpx.get(f"{base}/readyz")
        except httpx.ConnectError:
            return 0, ""
        return answer.status_code, answer.json()["detail"]

    async def run(settings: Settings) -> None:
        nonlocal down
        async with collecting(settings, Secrets(token="word")) as task:
            await until(lambda: ready() == (503, "judge is away"), task=task)
            assert (await asyncio.to_thread(httpx.get, f"{base}/status")).status_code == 401
            status = await asyncio.to_thread(lambda: httpx.get(f"{base}/status", headers=headers))
            assert f"judge at {url}/v1/judgements answered 503" in status.json()["detail"]
            assert (await asyncio.to_thread(httpx.get, f"{base}/healthz")).status_code == 200
            assert (await asyncio.to_thread(httpx.get, f"{base}/metrics")).status_code == 401
            down = False
            await until(lambda: ready() == (200, ""), task=task)
            text = (await asyncio.to_thread(lambda: httpx.get(f"{base}/metrics", headers=headers))).text
            assert 'headwater_service_up{service="judge"} 1.0' in text

    with served(StubServices(away).app) as url:
        asyncio.run(run(make_settings(url, collector={"port": port})))

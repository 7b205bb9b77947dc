"""The collector process: built from settings, runs until the trainer has finished or a signal comes.

    main task   waits for the first of: signal, trainer finished, failure
    beside it   health server, RunWatch (gate.py), leases (leases.py) -> parts (parts.py) -> windows (collect.py)

All tasks belong to one group that is cancelled at the end. Unfinished windows stay `reading` in the
ledger, and the next collector works on them again.
"""

import asyncio
import contextlib
import logging
import os
import secrets as random_names
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI

from services.app import create_app
from services.collector.clients import Services, build_services, http_client
from services.collector.gate import Gate, RunWatch
from services.collector.leases import LeaseKeeper
from services.collector.parts import PartWorker
from services.collector.sources.base import Source
from services.collector.sources.source import open_source
from services.collector.storage import Recorder, Storage
from services.collector.windows import PolicyTokenizer, WindowMaker
from services.concurrency import first_error
from shared.api import Readiness
from shared.coordination import Coordination
from shared.errors import SettingsError
from shared.http import refuse_open_binding
from shared.identity import Manifest
from shared.redis import connect
from shared.runs import Run
from shared.settings import Secrets, Settings
from shared.stream import WindowStream

_log = logging.getLogger(__name__)


def run(settings: Settings, secrets: Secrets) -> None:
    """The collector's whole life; returns when it is done. Raises HeadwaterError."""
    refuse_open_binding(settings.collector.host, secrets)
    if not settings.redis.url:
        raise SettingsError("redis.url is empty: start through `headwater run`, or give --redis.url redis://HOST:PORT")
    asyncio.run(_run_until_signal(settings, secrets))


async def _run_until_signal(settings: Settings, secrets: Secrets) -> None:
    work = asyncio.create_task(run_collector(settings, secrets))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        _log.info("stopped by a signal; unfinished windows are done again by the next collector")


async def run_collector(settings: Settings, secrets: Secrets) -> None:
    """Until the trainer has finished (then it returns, or stays idle where that is set), or until cancelled."""
    state = _State()
    server = health_server(build(secrets, state.trouble), host=settings.collector.host, port=settings.collector.port)
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve())
            await _collect_windows(settings, secrets, state)
            server.should_exit = True
            await serving
    except BaseExceptionGroup as failures:
        raise first_error(failures) from failures


@dataclass
class _State:
    """What /readyz and /status tell."""

    starting: bool = True
    storage: Storage | None = None
    others: list[Services | Source] = field(default_factory=list)
    """What else may be in trouble."""

    def trouble(self) -> dict[str, str]:
        """In a few words what is wrong, with the whole sentence."""
        found = {"the collector is starting": "the collector is starting"} if self.starting else {}
        away = dict(self.storage.trouble) if self.storage else {}
        for other in self.others:
            away |= other.trouble
        return found | {f"{name} is away": reason for name, reason in away.items()}


async def _collect_windows(settings: Settings, secrets: Secrets, state: _State) -> None:
    async with AsyncExitStack() as stack:
        loading = ThreadPoolExecutor(1, "loading")
        stack.callback(loading.shutdown, wait=False, cancel_futures=True)
        loop = asyncio.get_running_loop()
        tokenizer = await loop.run_in_executor(loading, PolicyTokenizer, settings.policy.tokenizer_source)
        storage = _open_storage(settings, tokenizer)
        stack.callback(storage.close)
        state.storage = storage
        await _prepare_stores(settings, storage)
        source = await loop.run_in_executor(loading, _open_source, settings, tokenizer.vocabulary_size)
        extent = await _adopt_source(settings, storage, await loop.run_in_executor(loading, source.manifest))
        http = await stack.enter_async_context(http_client(settings, token=secrets.token))
        services = build_services(settings, http)
        gate = Gate(max_in_flight=settings.collector.max_windows_in_flight, max_backlog=settings.collector.max_backlog)
        watch = RunWatch(
            storage,
            gate,
            num_parts=settings.documents.num_parts,
            extent=extent,
            steps=settings.trainer.steps,
            weight_version=await storage.newest_weight_version(),
        )
        maker = WindowMaker(tokenizer, settings.chunks, settings.run.seed)
        worker = PartWorker(settings, source, maker, services, storage, gate, watch, extent)
        stack.callback(worker.close)
        state.others += [services, source]
        state.starting = False
        await _work_until_finished(_lease_keeper(settings, storage, worker), watch)
    _log.info("the trainer has finished")
    if settings.collector.stay_when_finished:
        await asyncio.Event().wait()  # for a signal


async def _work_until_finished(leases: LeaseKeeper, watch: RunWatch) -> None:
    async with asyncio.TaskGroup() as group:
        holding = group.create_task(leases.run())
        watching = group.create_task(watch.run())
        await watch.finished.wait()
        holding.cancel()
        watching.cancel()


def _lease_keeper(settings: Settings, storage: Storage, worker: PartWorker) -> LeaseKeeper:
    owner = f"{socket.gethostname()}-{os.getpid()}-{random_names.token_hex(4)}"
    return LeaseKeeper(
        storage,
        worker.run,
        owner=owner,
        lease_s=settings.collector.lease_s,
        num_parts=settings.documents.num_parts,
        max_parts=settings.collector.max_parts,
    )


def _open_source(settings: Settings, vocabulary_size: int) -> Source:
    return open_source(settings.documents, seed=settings.run.seed, vocabulary_size=vocabulary_size)


def _open_storage(settings: Settings, tokenizer: PolicyTokenizer) -> Storage:
    client = connect(settings.redis.url, timeout_s=settings.redis.timeout_s)
    run = Run.of(settings)
    return Storage(
        stream=WindowStream(client, settings.run.name),
        coordination=Coordination(client, settings.run.name),
        run=run,
        recorder=Recorder(run, tokenizer, settings.collector.record_share),
        max_backoff_s=settings.collector.max_backoff_s,
    )


async def _prepare_stores(settings: Settings, storage: Storage) -> None:
    await storage.open_run(settings)


async def _adopt_source(settings: Settings, storage: Storage, manifest: Manifest) -> str:
    """The extent of this start (Run.extent). SourceError if the run began with other documents."""
    return await storage.adopt_source(manifest, max_epochs=settings.documents.max_epochs)


_MAX_REQUEST_BYTES = 65_536


_DESCRIPTION = "Reads documents, has their chunks continued, rewritten and judged, and writes them on the stream."


def build(secrets: Secrets, trouble: Callable[[], Mapping[str, str]]) -> FastAPI:
    """`trouble()` says at once what keeps the collector from its work: in a few words, each with the whole sentence."""

    def readiness() -> Readiness:
        found = trouble()
        return Readiness(ready=not found, service="collector", detail="; ".join(found.values()))

    return create_app(
        service="collector",
        title="Headwater collector",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=readiness,
        summary=lambda: "; ".join(trouble()),
        max_request_bytes=_MAX_REQUEST_BYTES,
    )


class HealthServer(uvicorn.Server):
    """Serves beside the work and leaves signals to it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def health_server(app: FastAPI, *, host: str, port: int) -> HealthServer:
    config = uvicorn.Config(
        app, host=host, port=port, lifespan="off", log_config=None, access_log=False, server_header=False
    )
    return HealthServer(config)

"""The collector process: built from settings, runs until the trainer has finished or a signal comes.

    main task   waits for the first of: signal, trainer finished, failure
    beside it   health server, RunWatch (gate.py), leases (leases.py) -> parts (parts.py) -> windows (collect.py)

All tasks belong to one group that is cancelled at the end. Unfinished windows stay `reading` in the
ledger, and the next collector works on them again.
"""

import asyncio
import logging
import os
import secrets as random_names
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from starlette.types import ASGIApp

from services.collector.clients import Services, build_services, http_client
from services.collector.gate import Gate, RunWatch
from services.collector.leases import LeaseKeeper
from services.collector.parts import PartWorker
from services.collector.probes import BASE_WINDOWS, Prober, probes_are_on
from services.collector.sources.source import Source, open_source
from services.collector.storage import Storage
from services.collector.windows import PolicyTokenizer, WindowMaker
from services.concurrency import first_error
from services.middleware import MetricsMiddleware
from shared.api import Readiness
from shared.coordination import Coordination
from shared.http import build_server, listen, operations_app, refuse_open_binding
from shared.redis import connect, require_url
from shared.runs import Run
from shared.settings import Secrets, Settings
from shared.stream import WindowStream

_log = logging.getLogger(__name__)


def run(settings: Settings, secrets: Secrets) -> None:
    """Until the trainer has finished or a signal comes. Raises HeadwaterError."""
    refuse_open_binding(settings.collector.host, secrets)
    require_url(settings.redis)
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
    server = build_server(_operations(secrets, state))
    sockets = listen(settings.collector.host, settings.collector.port, setting="collector.port")
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve(sockets))
            await _collect_windows(settings, secrets, state)
            server.should_exit = True
            await serving
    except BaseExceptionGroup as failures:
        raise first_error(failures) from failures


@dataclass
class _State:
    """What /readyz and /status tell."""

    starting: bool = True
    needed: list[Storage | Services | Source] = field(default_factory=list)
    """What may be away."""
    services: Services | None = None

    def trouble(self) -> dict[str, str]:
        """What keeps the collector from its work: in a few words, each with the whole sentence."""
        found = {"the collector is starting": "the collector is starting"} if self.starting else {}
        away = [item for needed in self.needed for item in needed.trouble.items()]
        return found | {f"{name} is away": reason for name, reason in away}

    def notes(self) -> dict[str, str]:
        """The same for what others stand in for: the collector is ready in spite of it."""
        return self.services.lost_replicas if self.services else {}


async def _collect_windows(settings: Settings, secrets: Secrets, state: _State) -> None:
    async with AsyncExitStack() as stack:
        loading = ThreadPoolExecutor(1, "loading")
        stack.callback(loading.shutdown, wait=False, cancel_futures=True)
        loop = asyncio.get_running_loop()
        tokenizer = await loop.run_in_executor(loading, PolicyTokenizer, settings.policy.tokenizer_source)
        storage = _open_storage(settings, tokenizer)
        stack.callback(storage.close)
        state.needed.append(storage)
        await storage.in_database(storage.run.open, settings)
        await storage.in_redis(storage.stream.create)
        open_documents = partial(open_source, seed=settings.run.seed, vocabulary_size=tokenizer.vocabulary_size)
        source = await loop.run_in_executor(loading, open_documents, settings.documents)
        manifest = await loop.run_in_executor(loading, source.manifest)
        await storage.in_database(storage.run.adopt_source, manifest)
        extent = await storage.in_database(storage.run.extent, max_epochs=settings.documents.max_epochs)
        http = await stack.enter_async_context(http_client(settings, token=secrets.token))
        services = build_services(settings, http)
        gate = Gate(max_in_flight=settings.collector.max_windows_in_flight, max_backlog=settings.collector.max_backlog)
        step = await storage.in_database(storage.run.newest_step)
        watch = RunWatch(storage, gate, settings, extent, step)
        maker = WindowMaker(tokenizer, settings.chunks, settings.run.seed)
        prober = Prober(settings, services.judge, storage, tokenizer)
        worker = PartWorker(settings, source, maker, services, storage, prober, gate, watch, extent)
        stack.callback(worker.close)
        state.needed += [services, source]
        state.services = services
        state.starting = False
        keeper = LeaseKeeper(
            storage,
            worker.run,
            owner=f"{socket.gethostname()}-{os.getpid()}-{random_names.token_hex(4)}",
            lease_s=settings.collector.lease_s,
            num_parts=settings.documents.num_parts,
            max_parts=settings.collector.max_parts,
        )
        async with asyncio.TaskGroup() as group:
            holding = group.create_task(keeper.run())
            await watch.run()
            holding.cancel()
    _log.info("the trainer has finished")
    if settings.collector.stay_when_finished:
        await asyncio.Event().wait()  # for a signal


def _open_storage(settings: Settings, tokenizer: PolicyTokenizer) -> Storage:
    client = connect(settings.redis.url, timeout_s=settings.redis.timeout_s)
    return Storage(
        WindowStream(client, settings.run.name),
        Coordination(client, settings.run.name),
        Run.of(settings),
        tokenizer,
        record_share=settings.collector.record_share,
        max_backoff_s=settings.collector.max_backoff_s,
        base_windows_to_keep=BASE_WINDOWS if probes_are_on(settings) else 0,
    )


def _operations(secrets: Secrets, state: _State) -> ASGIApp:
    def readiness() -> Readiness:
        found, notes = state.trouble(), state.notes()
        detail = "; ".join([*found.values(), *notes.values()])
        return Readiness(ready=not found, service="collector", detail=detail)

    def summary() -> str:
        return "; ".join([*state.trouble(), *state.notes()])

    return MetricsMiddleware(operations_app("collector", secrets=secrets, readiness=readiness, summary=summary))

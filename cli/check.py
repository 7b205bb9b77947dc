"""`headwater check`: Validate a configuration, reach everything it names, and say what would run.

Each probe says what it found, or raises HeadwaterError with the remedy. Starts nothing and writes nothing.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import redis
import sqlalchemy as sa

from cli.plan import Plan, Ports, make_plan, needed_services
from cli.run_folder import ConfigFile, Overrides, RunFolder
from cli.stack import find_redis_server
from services.collector.sources.base import Refusal
from services.collector.sources.source import Source
from shared.configuration import load_settings, without_passwords
from shared.database import translated
from shared.engine_settings import EngineSettings
from shared.errors import HeadwaterError, ServiceError, SettingsError, SourceError
from shared.http import authorization_header
from shared.identity import refuse_changed_identity, refuse_changed_source
from shared.judge_settings import CriterionSettings, ScheduleName
from shared.runs import Run
from shared.secret_urls import without_secrets
from shared.settings import Settings
from shared.weights.store import WeightStore

_TIMEOUT_S = 10.0
_PROBE_S = 60.0
"""For one short answer of an endpoint; they are asked for a few at a time."""
_OLDEST_REDIS = (6, 2)
_LARGEST_VOCABULARY = 2**31
"""The collector compares token ids with the policy's vocabulary, this does not."""
_SHOWN = 60


def check(config: ConfigFile, overrides: Overrides) -> int:
    """0 when a run could start, else 1. SettingsError names every wrong setting."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = load_settings(config, overrides)
    with Ports() as ports:
        plan = make_plan(settings, ports)
        problems = [problem for name, probe in probes(plan) if (problem := _try(name, probe))]
        for line in plan_lines(plan):
            print(without_secrets(line))
    if problems:
        print(f"\n{len(problems)} problem{'s' if len(problems) != 1 else ''}:")
    for problem in problems:
        print(f"  - {problem}")
    return 1 if problems else 0


def plan_lines(plan: Plan) -> list[str]:
    """One line for each process that would run, with its address."""
    settings = plan.settings
    rows = []
    if plan.embedded_redis_port is not None:
        rows.append(("redis", "embedded, a free port of 127.0.0.1"))
    for role in plan.roles:
        url = plan.ready_url(role)
        where = url.removesuffix("/readyz") if url else f"{settings.trainer.objective} to step {settings.trainer.steps}"
        rows.append((role, where))
    for role in needed_services(settings):
        if url := plan.service(role).url:
            rows.append((role, f"runs elsewhere: {url}"))
    lines = ["", f"would start {plan.num_processes} processes:", *(f"  {role:<10} {where}" for role, where in rows)]
    return lines + [f"  {note}" for note in plan.notes]


def _try(name: str, probe: Callable[[], str]) -> str | None:
    """The problem, or None."""
    try:
        found = probe()
    except HeadwaterError as exc:
        print(f"  NO   {name:<16} {exc}")
        return f"{name}: {exc}"
    print(f"  ok   {name:<16} {without_secrets(found)}")
    return None


def probes(plan: Plan) -> Iterator[tuple[str, Callable[[], str]]]:
    """Everything that the run would use, in that order: the setting or part that is reached, and its probe."""
    settings = plan.settings
    yield "run folder", partial(run_folder, settings)
    yield "policy.model", partial(policy, settings)
    yield "documents", partial(first_document, settings)
    yield "redis", partial(redis_server, settings)
    yield "database", partial(database, settings)
    yield "weights.store", partial(weight_store, settings)
    for role in needed_services(settings):
        service = plan.service(role)
        if service.url:
            yield from ((role, partial(remote_service, url, plan.secrets.token)) for url in service.base_urls)
        elif role != "judge" or judge_needs_engine(settings):
            default = settings.policy.model if role == "rollout" else ""
            yield f"{role}.engine", partial(model_of, service.engine, default, setting=f"{role}.engine.model")
    if "rewriter" in plan.roles:
        yield "rewriter.prompt", partial(rewriter_prompt, settings)
    if "judge" in plan.roles:
        yield "judge.criteria", partial(judge_criteria, settings)


def run_folder(settings: Settings) -> str:
    folder = RunFolder(settings.run.folder)
    if not folder.settings_file.exists():
        return f"{folder.path} is new"
    folder.refuse_another_run(settings)
    return f"{folder.path} exists: this run would be resumed"


def policy(settings: Settings) -> str:
    """It loads, and has room for the context."""
    from services.tokenizer import load_tokenizer

    description, room = model_folder(settings.policy.model, setting="policy.model")
    tokenizer = load_tokenizer(settings.policy.tokenizer_source, setting="policy.tokenizer")
    if room is not None and room < settings.chunks.context_tokens:
        raise SettingsError(
            f"policy.model has room for {room} tokens, chunks.context_tokens is {settings.chunks.context_tokens}: "
            "lower it, or choose a model with a longer context"
        )
    return f"{description}; tokenizer with {len(tokenizer)} tokens"


def model_of(engine: EngineSettings, default: str, *, setting: str) -> str:
    """The model of a local service."""
    from services.engine.life import build_engine

    build_engine(engine, default_model=default)  # refuses what it cannot build; loads nothing yet
    if engine.kind == "openai":
        return endpoint(engine)
    description, _ = model_folder(engine.model or default, setting=setting)
    return description


def model_folder(source: str, *, setting: str) -> tuple[str, int | None]:
    """A description, and the longest context in tokens. The configuration loads; in a folder the weights are complete
    safetensors."""
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1  # others are Hugging Face's [owner/]name
    if not source:
        raise SettingsError(f"{setting} is empty: name a model folder or a Hugging Face name")
    if is_path and not Path(source).is_dir():
        raise SettingsError(f"{setting} = {source!r}: there is no such folder (working directory {Path.cwd()})")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as exc:
        raise SettingsError(f"{setting} = {source!r} cannot be loaded: {exc}") from exc
    text = config.get_text_config(decoder=True)
    weights = _weights(Path(source), setting=setting) if Path(source).is_dir() else "weights come from the hub"
    return f"{source} ({config.model_type}, {weights})", getattr(text, "max_position_embeddings", None)


def _weights(folder: Path, *, setting: str) -> str:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingsError(f"{setting}: {folder} holds no *.safetensors")
    num_tensors = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                num_tensors += len(opened.keys())
        except (OSError, SafetensorError) as exc:
            raise SettingsError(f"{setting}: {file} is damaged: {exc}") from exc
    return f"{num_tensors} tensors, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def endpoint(engine: EngineSettings) -> str:
    """The OpenAI-compatible endpoint has the model; what it can do is tried, as the services do when they start."""
    answer = _get(f"{engine.endpoint.rstrip('/')}/models", os.environ.get(engine.key_variable, ""))
    names = [str(model.get("id")) for model in answer.json().get("data", [])]
    if engine.model not in names:
        raise SettingsError(f"{engine.endpoint} has no model {engine.model!r}; it has {', '.join(names) or 'none'}")
    return f"{engine.model} at {engine.endpoint}; {asyncio.run(_abilities(engine))}"


async def _abilities(engine: EngineSettings) -> str:
    from services.engine.openai import OpenAIEngine

    quick = engine.model_copy(update={"timeout_s": min(engine.timeout_s, _PROBE_S)})
    found = OpenAIEngine(quick, constrains=True)
    try:
        await found.start()
        return found.summary
    finally:
        await found.close()


def remote_service(url: str, token: str) -> str:
    """The service is ready and accepts the token."""
    data = _get(f"{url.rstrip('/')}/status", token).json()
    return f"{url} is ready ({data.get('engine', '')} {data.get('model', '')})".replace("  ", " ")


def _get(url: str, token: str) -> httpx.Response:
    try:
        answer = httpx.get(url, headers=authorization_header(token), timeout=_TIMEOUT_S)
    except httpx.HTTPError as exc:
        raise ServiceError(f"{url} cannot be reached: {exc}", retryable=True) from exc
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServiceError(f"{url} refuses the token (status {answer.status_code})", retryable=False)
    if not answer.is_success:
        raise ServiceError(f"{url} answers {answer.status_code}: {answer.text[:200]}", retryable=True)
    return answer


def redis_server(settings: Settings) -> str:
    if not settings.redis.url:
        return f"embedded: {find_redis_server()}"
    client = redis.Redis.from_url(settings.redis.url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    try:
        version = str(client.info("server")["redis_version"])
    except redis.RedisError as exc:
        raise HeadwaterError(f"redis.url cannot be used: {exc}") from exc
    finally:
        client.close()
    if tuple(int(piece) for piece in version.split(".")[:2]) < _OLDEST_REDIS:
        raise HeadwaterError(f"redis.url is Redis {version}, 6.2 or newer is needed")
    return f"Redis {version} at redis.url"


def database(settings: Settings) -> str:
    """Reachable; a run of this name in it has the same identity and documents."""
    if not settings.database.url and not (settings.run.folder / "headwater.db").exists():
        return f"SQLite in {settings.run.folder}"
    run = Run.of(settings)
    try:
        with translated(), run.database.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
        start = run.began_with()
    finally:
        run.close()
    if start is not None:
        now = without_passwords(settings).model_dump(mode="json")
        refuse_changed_identity(start.settings, now, run=f"{settings.run.name!r} of this database")
    if start is not None and start.source is not None:
        refuse_changed_source(start.source, documents(settings).manifest(), run=settings.run.name)
    return f"{run.database.dialect.name} {'at database.url' if settings.database.url else f'in {settings.run.folder}'}"


def weight_store(settings: Settings) -> str:
    try:
        versions = WeightStore(settings.weight_store_url).versions()
    except (OSError, ValueError, ImportError) as exc:
        raise SettingsError(f"weights.store = {settings.weight_store_url!r} cannot be read: {exc}") from exc
    return f"{settings.weight_store_url} ({len(versions)} versions)"


def rewriter_prompt(settings: Settings) -> str:
    from services.rewriter.rewriter import load_prompt

    load_prompt(settings.rewriter.prompt)
    return str(settings.rewriter.prompt or "as shipped")


def judge_criteria(settings: Settings) -> str:
    """With what the pairwise ones cost and reach."""

    from services.judge.build import load_parts

    parts = load_parts(settings.judge)
    num_candidates = max(stage.num_candidates for stage in settings.collector.schedule)
    shown = []
    for name, criterion in settings.judge.criteria.items():
        question = parts.questions.get(name)
        cost = f"; {_cost(criterion, num_candidates)}" if question and question.is_pairwise else ""
        shown.append(f"{name} (weight {criterion.weight:g}{cost})")
    return ", ".join(shown)


def _cost(criterion: CriterionSettings, num_candidates: int) -> str:
    """The dial of a pairwise criterion: calls, and the share of the all-pairs choice, simulated."""
    from services.judge.posterior import Temper
    from services.judge.schedules import expected_share, most_calls

    schedules: tuple[ScheduleName, ScheduleName] = (criterion.schedule, "all_pairs")
    given: dict[str, Any] = {
        "graded": criterion.verdict == "labels",
        "budget": criterion.budget,
        "samples": 1 if criterion.verdict == "labels" else criterion.samples,
    }
    calls, all_calls = (most_calls(name, num_candidates, **given) for name in schedules)
    share, all_share = (expected_share(name, num_candidates, **given, temper=Temper()) for name in schedules)
    return (
        f"{criterion.schedule} of {num_candidates} candidates: at most {calls} calls a chunk for about "
        f"{min(1.0, share / all_share):.0%} of what all pairs choose in {all_calls}"
    )


def judge_needs_engine(settings: Settings) -> bool:
    return any(settings.judge.asks_model(name) for name in settings.judge.criteria)


def documents(settings: Settings) -> Source:
    """Opened as the collector does."""
    from services.collector.sources.source import open_source

    return open_source(settings.documents, seed=settings.run.seed, vocabulary_size=_LARGEST_VOCABULARY)


def first_document(settings: Settings) -> str:
    """The beginning of the first record."""
    first = next(iter(documents(settings).read(0, epoch=0, start=0)), None)
    if first is None:
        raise SourceError(f"documents.path = {settings.documents.path!r} has no record")
    if isinstance(first, Refusal):
        raise SourceError(f"the first record is refused ({first.reason}): {first.detail}")
    content = first.content
    if isinstance(content, str):
        return f"{first.source_id}: {content[:_SHOWN]!r}" + ("..." if len(content) > _SHOWN else "")
    return f"{first.source_id}: {len(content)} token ids: {', '.join(map(str, content[:8]))}, ..."

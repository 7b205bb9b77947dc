"""The roles of processes, and every Prometheus metric. /metrics of a process serves those of its role: a judge that
showed `headwater_weight_version 0` would be the smallest version of all replicas."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.registry import Collector

T = TypeVar("T", bound=Collector)

EngineRole = Literal["rollout", "rewriter", "judge"]
ServiceRole = Literal[EngineRole, "collector"]
Role = Literal[ServiceRole, "trainer"]
ENGINES: tuple[EngineRole, ...] = get_args(EngineRole)
SERVICES: tuple[ServiceRole, ...] = get_args(ServiceRole)
ROLES: tuple[Role, ...] = get_args(Role)

REGISTRY = CollectorRegistry()
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_of_role: dict[str, CollectorRegistry] = {role: CollectorRegistry() for role in ROLES}


def registry_of(role: str) -> CollectorRegistry:
    """What /metrics of a process with this role serves."""
    return _of_role[role]


def _metric(kind: Callable[..., T], roles: Sequence[str], name: str, text: str, *labels: str) -> T:
    return _listed(kind(f"headwater_{name}", text, labels, registry=REGISTRY), roles)


def _listed(metric: T, roles: Sequence[str]) -> T:
    for role in roles:
        _of_role[role].register(metric)
    return metric


_counter = partial(_metric, Counter)
_gauge = partial(_metric, Gauge)
_histogram = partial(_metric, partial(Histogram, buckets=_SECONDS))
_listed(ProcessCollector(registry=REGISTRY), ROLES)  # process_*: memory, CPU seconds, open files

# Every service
requests_total = _counter(SERVICES, "requests_total", "HTTP requests answered", "route", "status")
request_seconds = _histogram(SERVICES, "request_seconds", "Seconds to answer a request", "route")
requests_in_flight = _gauge(SERVICES, "requests_in_flight", "Requests of work not yet answered")
ready = _gauge(SERVICES, "ready", "1 when the service can answer")

# Engines
engine_prompt_tokens_total = _counter(ENGINES, "engine_prompt_tokens_total", "Prompt tokens prefilled")
engine_generated_tokens_total = _counter(ENGINES, "engine_generated_tokens_total", "Tokens sampled")
engine_prefix_cache_queries_total = _counter(
    ENGINES, "engine_prefix_cache_queries_total", "Prompt tokens looked up in vLLM's prefix cache"
)
engine_prefix_cache_hits_total = _counter(
    ENGINES, "engine_prefix_cache_hits_total", "Prompt tokens found in vLLM's prefix cache"
)
engine_guessed_tokens_total = _counter(ENGINES, "engine_guessed_tokens_total", "Tokens guessed by n-gram look-up")
engine_accepted_tokens_total = _counter(ENGINES, "engine_accepted_tokens_total", "Guessed tokens that were right")
engine_batch_rows = _gauge(ENGINES, "engine_batch_rows", "Rows of the last batch")
engine_queued_requests = _gauge(ENGINES, "engine_queued_requests", "Requests waiting for the engine")

# Rollout
weight_version = _gauge(["rollout", "trainer"], "weight_version", "Weight version that new requests are answered under")
weight_load_seconds = _histogram(["rollout"], "weight_load_seconds", "Seconds of a weight update by phase", "phase")
weight_bytes_fetched_total = _counter(["rollout"], "weight_bytes_fetched_total", "Bytes of versions fetched", "form")
failed_patches_total = _counter(["rollout"], "failed_patches_total", "Changes that an engine could not take in place")
refused_weights_total = _counter(["rollout"], "refused_weights_total", "Weight versions that could not be loaded")

# Rewriter, judge
rewrites_total = _counter(["rewriter"], "rewrites_total", "Rewrites by outcome", "outcome")
judge_calls_total = _counter(["judge"], "judge_calls_total", "Engine calls for verdicts", "criterion")
judge_failures_total = _counter(["judge"], "judge_failures_total", "Calls without a verdict", "criterion", "cause")
judge_remembered_total = _counter(["judge"], "judge_remembered_total", "Calls spared: their answers were remembered")
judge_engine_retries_total = _counter(["judge"], "judge_engine_retries_total", "Calls tried again: the engine failed")
judge_waiting_questions = _gauge(["judge"], "judge_waiting_questions", "Calls that wait for a place in the engine")
judge_comparisons_total = _counter(
    ["judge"], "judge_comparisons_total", "Pairs compared, by the place of the winner", "criterion", "outcome"
)
judge_expected_share = _gauge(
    ["judge"], "judge_expected_share", "Of the best possible spread between chosen and rejected", "criterion"
)
judge_cut_candidates_total = _counter(
    ["judge"], "judge_cut_candidates_total", "Candidates longer than a classifier's longest input", "criterion"
)
judge_info = _gauge(["judge"], "judge_info", "1 for the judge in service: a hash of all settings", "fingerprint")

# Collector
windows_read_total = _counter(["collector"], "windows_read_total", "Document windows read, refused ones included")
windows_scored_total = _counter(["collector"], "windows_scored_total", "Document windows written to the stream")
windows_dropped_total = _counter(["collector", "trainer"], "windows_dropped_total", "Windows dropped", "reason")
chunks_scored_total = _counter(["collector"], "chunks_scored_total", "Chunks with candidates")
chunks_dropped_total = _counter(["collector"], "chunks_dropped_total", "Chunks dropped", "reason")
candidates_total = _counter(["collector"], "candidates_total", "Candidates collected", "kind")
candidates_absent_total = _counter(["collector"], "candidates_absent_total", "Missing candidates", "kind", "reason")
candidate_reward_sum = _counter(["collector"], "candidate_reward_sum", "Sum of rewards", "kind")
candidates_scored_total = _counter(["collector"], "candidates_scored_total", "Candidates that have a reward", "kind")
candidates_barred_total = _counter(["collector"], "candidates_barred_total", "Candidates below a threshold", "kind")
originals_checked_total = _counter(["collector"], "originals_checked_total", "Safety checks of originals", "outcome")
windows_held_back = _gauge(["collector"], "windows_held_back", "Windows in a row that could not be scored")
judge_probes_total = _counter(["collector"], "judge_probes_total", "Known pairs shown to the judge", "kind", "outcome")
service_retries_total = _counter(["collector"], "service_retries_total", "Requests tried again", "service")
service_up = _gauge(["collector"], "service_up", "1 when the last request to the service succeeded", "service")
replica_up = _gauge(["collector"], "replica_up", "1 when the replica's last request succeeded", "service", "replica")
replica_requests_total = _counter(
    ["collector"],
    "replica_requests_total",
    "Requests to a replica by why it was picked",
    "service",
    "replica",
    "choice",
)
replica_requests_in_flight = _gauge(
    ["collector"], "replica_requests_in_flight", "Requests that a replica has in work", "service", "replica"
)
windows_in_flight = _gauge(["collector"], "windows_in_flight", "Windows being generated and judged")
leased_parts = _gauge(["collector"], "leased_parts", "Parts of the source held by this collector")
role_seconds_total = _counter(["collector"], "role_seconds_total", "Seconds waited for a service", "role")

# Stream
stream_unread = _gauge(["collector"], "stream_unread", "Windows on the stream not yet delivered")
stream_pending = _gauge(["collector"], "stream_pending", "Windows delivered and not yet in a checkpoint")

# Trainer
step = _gauge(["trainer"], "step", "Optimizer steps taken")
training_figure = _gauge(["trainer"], "training_figure", "Figures of the last step", "name")
trained_tokens_total = _counter(["trainer"], "trained_tokens_total", "Target tokens in losses")
skipped_steps_total = _counter(["trainer"], "skipped_steps_total", "Steps skipped for a non-finite loss")
live_replicas = _gauge(["trainer"], "live_replicas", "Rollout replicas whose heartbeat has not expired")
replica_version = _gauge(["trainer"], "replica_version", "Weight version that a live replica serves", "replica")
replica_waits_total = _counter(["trainer"], "replica_waits_total", "Waits for replicas to catch up", "outcome")
weight_push_bytes_total = _counter(["trainer"], "weight_push_bytes_total", "Bytes of weight versions written", "form")
weight_push_seconds = _histogram(["trainer"], "weight_push_seconds", "Seconds to write and announce a version")

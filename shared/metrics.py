"""Every Prometheus metric of every process, in one list. /metrics of each process serves those it touched."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)  # process_*: memory, CPU seconds, open files
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"headwater_{name}", text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"headwater_{name}", text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(f"headwater_{name}", text, labels, registry=REGISTRY, buckets=_SECONDS)


# Every service
requests_total = _counter("requests_total", "HTTP requests answered", "route", "status")
request_seconds = _histogram("request_seconds", "Seconds to answer a request", "route")
requests_in_flight = _gauge("requests_in_flight", "Requests of work not yet answered, health and metrics left out")
ready = _gauge("ready", "1 when the service can answer")

# Engines
engine_prompt_tokens_total = _counter("engine_prompt_tokens_total", "Prompt tokens prefilled")
engine_generated_tokens_total = _counter("engine_generated_tokens_total", "Tokens sampled")
engine_batch_rows = _gauge("engine_batch_rows", "Rows of the last batch")
engine_queued_requests = _gauge("engine_queued_requests", "Requests waiting for the engine")

# Rollout
policy_version = _gauge("policy_version", "Weight version that new requests are answered under")
weight_load_seconds = _histogram("weight_load_seconds", "Seconds of a weight update by phase", "phase")
weight_bytes_fetched_total = _counter("weight_bytes_fetched_total", "Bytes of weight versions fetched", "form")
failed_patches_total = _counter("failed_patches_total", "Changes that an engine could not take in place")
refused_weights_total = _counter("refused_weights_total", "Weight versions that could not be loaded")

# Rewriter, judge
rewrites_total = _counter("rewrites_total", "Rewrites by outcome", "outcome")
judge_calls_total = _counter("judge_calls_total", "Engine calls for verdicts", "criterion")
judge_failures_total = _counter("judge_failures_total", "Verdicts that could not be read", "criterion")
judge_info = _gauge("judge_info", "1 for the judge in service: model, prompts and settings as one hash", "fingerprint")

# Collector
documents_read_total = _counter("documents_read_total", "Document windows read, refused ones included")
documents_scored_total = _counter("documents_scored_total", "Document windows written to the stream")
documents_dropped_total = _counter("documents_dropped_total", "Document windows dropped", "reason")
chunks_scored_total = _counter("chunks_scored_total", "Chunks with candidates")
chunks_dropped_total = _counter("chunks_dropped_total", "Chunks dropped", "reason")
candidates_total = _counter("candidates_total", "Candidates collected", "kind")
candidates_absent_total = _counter("candidates_absent_total", "Candidates that could not be had", "kind", "reason")
candidate_reward_sum = _counter("candidate_reward_sum", "Sum of rewards", "kind")
service_retries_total = _counter("service_retries_total", "Requests to a service that were tried again", "service")
service_up = _gauge("service_up", "1 when the last request to the service succeeded", "service")
documents_in_flight = _gauge("documents_in_flight", "Windows being generated and judged")
leased_parts = _gauge("leased_parts", "Parts of the source held by this collector")
role_seconds_total = _counter("role_seconds_total", "Seconds waited for a service", "role")

# Stream (read by collector and trainer)
stream_unread = _gauge("stream_unread", "Documents on the stream not yet delivered")
stream_pending = _gauge("stream_pending", "Documents delivered and not yet in a checkpoint")

# Trainer
step = _gauge("step", "Optimizer steps taken")
training_figure = _gauge("training_figure", "Figures of the last step", "name")
trained_tokens_total = _counter("trained_tokens_total", "Target tokens in losses")
stale_documents_total = _counter("stale_documents_total", "Windows dropped for their policy lag")
skipped_steps_total = _counter("skipped_steps_total", "Steps skipped for a non-finite loss")
live_replicas = _gauge("live_replicas", "Rollout replicas whose heartbeat has not expired")
replica_version = _gauge("replica_version", "Weight version that a live replica serves", "replica")
replica_waits_total = _counter("replica_waits_total", "Times the trainer waited for replicas to catch up", "outcome")
weight_push_bytes_total = _counter("weight_push_bytes_total", "Bytes of weight versions written", "form")
weight_push_seconds = _histogram("weight_push_seconds", "Seconds to write and announce a version")

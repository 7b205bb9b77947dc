"""Whether a window's requests and its entry on the stream are within their limits. Called while settings are read.

Sizes are those of a window full of chunks, each with all its candidates at their longest, at `TEXT_BYTES` a token,
about three times English. A window with even longer text is answered 413 by the service, which stops the collector.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.api import MAX_CHUNKS
from shared.comparisons import PACKED_BYTES

if TYPE_CHECKING:
    from shared.engine_settings import EngineSettings, ServiceSettings
    from shared.judge_settings import CriterionSettings
    from shared.settings import Settings

TEXT_BYTES = 12
"""Of a token's text in JSON or msgpack."""
MAX_ENTRY_BYTES = 256 * 1024 * 1024
"""Of a scored window before compression. Redis accepts strings of 512 MB."""

_MOVED_TOKENS = 3
"""How much shorter than the suffix a chunk may be to end with a whole character."""
_ID_JSON_BYTES = 7
"""Up to six digits and a comma."""
_ID_PACKED_BYTES = 5
_CHUNK_BYTES = 120
_CANDIDATE_BYTES = 120
_JUDGED_BYTES = 32
_SCORE_BYTES = 9
_CALLS_A_CANDIDATE = 9
"""More than a tournament's budget where none is set."""
_PAIR_KINDS = ("quality", "coherence", "pairwise")
_WITHOUT_TEXT = ("likelihood", "classifier", "python")
"""Kinds of criteria."""
_REQUEST_BYTES = 1000
_SMALLER = "lower chunks.context_tokens or the schedule's num_rollouts, or set chunks.chunks_per_window"


def problems(settings: "Settings") -> Iterator[str]:
    """One sentence for each, with the numbers and the remedy."""
    yield from _too_many_chunks(settings)
    shape = (
        f"a window of {settings.chunks.context_tokens:,} tokens (chunks.context_tokens) with "
        f"{_most_candidates(settings)} candidates for each of {most_chunks(settings):,} chunks makes"
    )
    for role, num_bytes in request_bytes(settings).items():
        service: ServiceSettings = getattr(settings, role)
        if num_bytes > service.max_request_bytes:
            yield (
                f"{shape} requests of up to {num_bytes:,} bytes to the {role}, "
                f"{role}.max_request_bytes = {service.max_request_bytes:,} allows fewer: raise it, or {_SMALLER}"
            )
        yield from _too_slow(settings, role, service)
    if (found := entry_bytes(settings)) > MAX_ENTRY_BYTES:
        yield f"{shape} an entry of up to {found:,} bytes on the stream, which takes {MAX_ENTRY_BYTES:,}: {_SMALLER}"


def most_chunks(settings: "Settings") -> int:
    """Of one window."""
    chunks = settings.chunks
    fitting = -(-chunks.context_tokens // max(1, chunks.suffix_tokens - _MOVED_TOKENS))
    return min(fitting, chunks.chunks_per_window or fitting)


def _most_suffix_tokens(settings: "Settings") -> int:
    """Of all chunks of one window. Candidates of a tail may be longer than it, by less than a suffix."""
    suffix_tokens = settings.chunks.suffix_tokens
    return suffix_tokens + min(settings.chunks.context_tokens, most_chunks(settings) * suffix_tokens)


def request_bytes(settings: "Settings") -> dict[str, int]:
    """The longest request that one window makes, by role."""
    context, num_chunks = settings.chunks.context_tokens, most_chunks(settings)
    found = {}
    if "rollout" in settings.kinds:
        found["rollout"] = _REQUEST_BYTES + context * _ID_JSON_BYTES + num_chunks * _CHUNK_BYTES
    if "rewrite" in settings.kinds:
        found["rewriter"] = _REQUEST_BYTES + context * TEXT_BYTES + num_chunks * _CHUNK_BYTES
    if settings.needs_judge:
        token_bytes = TEXT_BYTES + ("likelihood" in settings.judge.kinds) * _ID_JSON_BYTES
        num_tokens = context + _most_candidates(settings) * _most_suffix_tokens(settings)
        around = num_chunks * (_CHUNK_BYTES + _most_candidates(settings) * _JUDGED_BYTES)
        found["judge"] = _REQUEST_BYTES + num_tokens * token_bytes + around
    return found


def entry_bytes(settings: "Settings") -> int:
    """Of the longest scored window, packed."""
    num_candidates = _most_candidates(settings)
    criteria = settings.judge.criteria if settings.needs_judge else {}
    candidate = _CANDIDATE_BYTES + (1 + len(criteria)) * _SCORE_BYTES
    reasoning = max((_reasoning_bytes(settings.judge.kind(name), criteria[name]) for name in criteria), default=0)
    compared = most_comparisons(settings) * PACKED_BYTES if settings.needs_judge else 0
    around = most_chunks(settings) * (2 * _CHUNK_BYTES + reasoning + compared + num_candidates * candidate)
    num_tokens = num_candidates * _most_suffix_tokens(settings)
    num_ids = settings.chunks.context_tokens + num_tokens
    return _REQUEST_BYTES + num_ids * _ID_PACKED_BYTES + num_tokens * TEXT_BYTES + around


def most_comparisons(settings: "Settings") -> int:
    """Of one chunk, of all criteria that compare pairs."""
    judge, num_candidates = settings.judge, _most_candidates(settings)
    return sum(
        _most_calls(criterion, num_candidates)
        for name, criterion in judge.criteria.items()
        if judge.kind(name) in _PAIR_KINDS
    )


def _most_calls(criterion: "CriterionSettings", num_candidates: int) -> int:
    num_pairs = num_candidates - 1 if criterion.schedule == "pivot" else num_candidates * (num_candidates - 1) // 2
    every = num_pairs * max(2, criterion.samples)  # graded ones are asked about in both orders
    if criterion.schedule != "tournament":
        return every
    return criterion.budget or min(every, _CALLS_A_CANDIDATE * num_candidates)


def _reasoning_bytes(kind: str, criterion: "CriterionSettings") -> int:
    is_silent = kind in _WITHOUT_TEXT or criterion.verdict == "labels"
    return 0 if is_silent else criterion.max_answer_tokens * TEXT_BYTES


def _most_candidates(settings: "Settings") -> int:
    """Of one chunk, in the stage that makes the most."""
    return max(stage.num_candidates for stage in settings.collector.schedule)


def _too_many_chunks(settings: "Settings") -> Iterator[str]:
    found, chunks = most_chunks(settings), settings.chunks
    if found > MAX_CHUNKS:
        yield (
            f"chunks.context_tokens = {chunks.context_tokens:,} in suffixes of chunks.suffix_tokens = "
            f"{chunks.suffix_tokens} are {found:,} chunks a window, requests take {MAX_CHUNKS:,}: raise suffix_tokens, "
            "lower context_tokens, or draw chunks.chunks_per_window of them"
        )


def _too_slow(settings: "Settings", role: str, service: "ServiceSettings") -> Iterator[str]:
    engine: EngineSettings = service.engine
    if not service.url and settings.collector.request_timeout_s < engine.timeout_s:
        yield (
            f"collector.request_timeout_s = {settings.collector.request_timeout_s:g} is less than "
            f"{role}.engine.timeout_s = {engine.timeout_s:g}: the collector would ask again for what the {role} still "
            "works at; raise the one or lower the other"
        )

"""Scored windows made by hand for the trainer's tests."""

from collections.abc import Sequence

from shared.records import Candidate, CandidateKind, Judgement, ScoredChunk, ScoredWindow, WindowKey

RUN = "r"


def candidate(kinds: CandidateKind | tuple[CandidateKind, ...], *token_ids: int, version: int = 0) -> Candidate:
    made = (kinds,) if isinstance(kinds, str) else kinds
    return Candidate(
        kinds=made,
        token_ids=token_ids,
        text=" ".join(map(str, token_ids)),
        weight_version=version if "rollout" in made else None,
    )


def chunk(
    start: int,
    candidates: Sequence[Candidate],
    rewards: Sequence[float | None] | None = None,
    *,
    barred: Sequence[int] = (),
) -> ScoredChunk:
    judgement = None
    if rewards is not None:
        judgement = Judgement(rewards=tuple(rewards), scores={}, barred=tuple(barred), num_calls=1, fingerprint="f")
    return ScoredChunk(start=start, candidates=tuple(candidates), judgement=judgement)


def window(
    position: int, chunks: Sequence[ScoredChunk], *, token_ids: Sequence[int] = tuple(range(1, 13)), run: str = RUN
) -> ScoredWindow:
    return ScoredWindow(
        run_id=run,
        key=WindowKey(part=0, epoch=0, position=position, window=0),
        source_id=f"d{position}",
        token_ids=tuple(token_ids),
        chunks=tuple(chunks),
        read_at=0.0,
        scored_at=1.0,
        seconds={"rollout": 0.5, "judge": 0.25},
    )


def plain_window(position: int, *, num_chunks: int = 3, version: int = 0, run: str = RUN) -> ScoredWindow:
    """Every chunk has a winner (the original) and a loser (a rollout); all tokens depend on `position`."""
    trunk = [1 + (7 * position + i) % 29 for i in range(4 + 4 * num_chunks)]
    chunks = []
    for index in range(num_chunks):
        start = 4 + 4 * index
        loser = [1 + (3 * position + 5 * index + i) % 29 for i in range(1 + index % 4)]
        pool = [candidate("original", *trunk[start : start + 4]), candidate("rollout", *loser, version=version)]
        chunks.append(chunk(start, pool, (1.0, 0.0)))
    return window(position, chunks, token_ids=trunk, run=run)


def tie(position: int, run: str = RUN) -> ScoredWindow:
    """Its only chunk has no preference."""
    return window(position, [chunk(4, [candidate("original", 1), candidate("rewrite", 2)], (0.5, 0.5))], run=run)

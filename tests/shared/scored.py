"""Small scored windows by hand."""

from shared.records import Candidate, Judgement, ScoredChunk, ScoredWindow, WindowKey


def scored_window(position: int = 0, *, part: int = 0, window: int = 0, text: str = " river") -> ScoredWindow:
    original = Candidate(kinds=("original",), token_ids=(3, 4), text=text)
    rollout = Candidate(kinds=("rollout",), token_ids=(5,), text=" hill", weight_version=2, finish_reason="stop")
    judgement = Judgement(rewards=(0.75, 0.25), scores={"quality": (0.75, 0.25)}, num_calls=2, fingerprint="f")
    return ScoredWindow(
        run_id="run",
        key=WindowKey(part=part, epoch=0, position=position, window=window),
        source_id=f"d{position}",
        token_ids=(1, 2, 3, 4),
        chunks=(ScoredChunk(start=2, candidates=(original, rollout), judgement=judgement),),
        read_at=1.5,
        scored_at=2.5,
    )

"""`headwater judge-compare`: Ask another judge about a run's recorded candidates, before it judges a run.

    recorded chunks of RUN --texts--> judge of SETTINGS --rewards--> agreement with the rewards of then

Reads the run's database and changes nothing. The other judge is the one at judge.url, or the service in this process;
it sees the texts in the places in which the run's judge saw them, with the original as reference. Only windows that
collector.record_share has drawn are recorded.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from cli.judge_access import MeasuredJudge, open_judge
from cli.judge_agreement import Agreement, Flip, Opinion, Replay, agreement_of
from cli.judge_figures import Share
from cli.run_folder import Overrides, RunName, find_run
from services.collector.windows import PolicyTokenizer
from shared.api import JudgedText, JudgementFailure, JudgementItem, JudgementRequest, Readiness
from shared.configuration import load_secrets, load_settings
from shared.errors import HeadwaterError
from shared.recordings import RecordedChunk, read_recorded
from shared.records import WindowKey
from shared.runs import reading_run
from shared.seeds import seed_of
from shared.settings import Secrets, Settings

if TYPE_CHECKING:
    from services.engine.base import Engine

_SHOWN_CHARACTERS = 300

_CHUNKS = typer.Option(min=1, help="Recorded chunks to ask about, evenly from the whole run.")
_LEAST = typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Exit 1 unless this share of the pairs' orders agree.")


def judge_compare(
    run: RunName,
    settings_file: Annotated[
        Path, typer.Argument(metavar="SETTINGS", help="TOML file with the other [judge] section.")
    ],
    overrides: Overrides,
    *,
    chunks: Annotated[int, _CHUNKS] = 200,
    show: Annotated[int, typer.Option(min=0, help="Flipped pairs to print with their texts.")] = 3,
    at_least: Annotated[float, _LEAST] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds within which the judge must be ready.")] = 1800.0,
) -> int:
    """0: compared, and they agree as far as `--at-least` says."""
    settings = load_settings(settings_file, overrides)
    _, of_run = find_run(run)
    with reading_run(of_run) as opened:
        recorded = read_recorded(opened.database, opened.name, limit=chunks)
    if not recorded:
        raise HeadwaterError(
            f"run {of_run.run.name} has no recorded chunk with a judgement: raise collector.record_share (it draws the "
            "windows whose candidates are kept)"
        )
    report = asyncio.run(replay(recorded, of_run, settings, load_secrets(), timeout_s=timeout))
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_data(), indent=2) + "\n", encoding="utf-8")
    print("\n".join(report.as_lines(show=show)))
    return 0 if report.agreement.orders.number == 0 or report.agreement.orders.mean >= at_least else 1


@dataclass(frozen=True)
class CompareReport:
    run: str
    replays: tuple[Replay, ...]
    judge: Readiness
    """The other one."""
    seconds: float
    """Of the other judge, for all chunks."""

    @cached_property
    def agreement(self) -> Agreement:
        return agreement_of(self.replays)

    @property
    def flips(self) -> list[Flip]:
        """The most certain ones first."""
        return sorted((flip for one in self.replays if (flip := one.flip)), key=lambda flip: -flip.gap)

    @property
    def failures(self) -> Counter[str]:
        return Counter(replay.reason for replay in self.replays if replay.now is None)

    @property
    def num_cut(self) -> int:
        """Chunks without their window's text: rows of an older version."""
        return sum(not replay.chunk.has_window for replay in self.replays)

    @property
    def costs(self) -> dict[str, dict[str, float | None]]:
        """Calls and wall seconds a chunk, then and now."""
        number = len(self.replays)
        seconds = [replay.chunk.judge_seconds for replay in self.replays if replay.chunk.judge_seconds is not None]
        return {
            "then": {
                "calls": sum(replay.chunk.num_calls for replay in self.replays) / number,
                "seconds": sum(seconds) / len(seconds) if seconds else None,
            },
            "now": {
                "calls": sum(replay.num_calls for replay in self.replays) / number,
                "seconds": self.seconds / number,
            },
        }

    def as_data(self) -> dict[str, Any]:
        then = Counter(replay.chunk.fingerprint for replay in self.replays)
        about = {"run": self.run, "chunks": len(self.replays), "cut_prefixes": self.num_cut, "failures": self.failures}
        judges = {"fingerprints_then": then, "fingerprint": self.judge.fingerprint, "model": self.judge.model}
        figures = {"agreement": self.agreement.as_data(), "a_chunk": self.costs}
        return about | judges | figures | {"flips": [flip.as_data() for flip in self.flips]}

    def as_lines(self, *, show: int) -> list[str]:
        then = ", ".join(sorted({replay.chunk.fingerprint for replay in self.replays}))
        lines = [f"{len(self.replays)} chunks of {self.run}, judged by {then}, now by {self.judge.fingerprint} "
                 f"({self.judge.model or 'no model'})", ""]  # fmt: skip
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        for flip in self.flips[:show]:
            lines += ["", *_flip_lines(flip)]
        return lines

    def _rows(self) -> list[tuple[str, str]]:
        found, costs = self.agreement, self.costs
        correlation = "-" if found.correlation is None else f"{found.correlation:.3f}"
        rows = [
            ("same candidate chosen", _shown(found.chosen)),
            ("same candidate rejected", _shown(found.rejected)),
            ("pairs in the same order", f"{found.orders.mean:.3f}" if found.orders.number else "-"),
            ("trained pairs that would flip", _shown(found.flipped)),
            ("rank correlation", correlation),
        ]
        rows += [(f"chosen {kind}", f"{a:.1%} -> {b:.1%}") for kind, (a, b) in found.chosen_kinds.items()]
        for name in ("calls", "seconds"):
            a, b = costs["then"][name], costs["now"][name]
            rows.append((f"{name} a chunk", f"{'unknown' if a is None else f'{a:.2f}'} -> {b:.2f}"))
        if self.failures:
            rows.append(("not judged", ", ".join(f"{n} {reason}" for reason, n in self.failures.most_common())))
        if self.num_cut:
            rows.append(("with a shortened prefix", f"{self.num_cut}: recorded by an older version"))
        return rows


async def replay(
    recorded: Sequence[RecordedChunk],
    of_run: Settings,
    settings: Settings,
    secrets: Secrets,
    *,
    timeout_s: float,
    engine: "Engine | None" = None,
) -> CompareReport:
    """`engine` replaces that of the settings (tests)."""
    async with open_judge(settings, secrets, timeout_s=timeout_s, engine=engine) as judge:
        asker = _Replayer(judge, of_run)
        began = time.monotonic()
        replays = await judge.all_of([partial(asker.replay, chunk) for chunk in recorded])
        seconds = time.monotonic() - began
        report = CompareReport(of_run.run.name, tuple(replays), judge.readiness, seconds)
    if all(one.now is None for one in replays):
        raise HeadwaterError(f"the judge judged none of {len(replays)} chunks: {dict(report.failures)}")
    return report


@dataclass
class _Replayer:
    judge: MeasuredJudge
    of_run: Settings

    @cached_property
    def tokenizer(self) -> PolicyTokenizer:
        """Only a judge of tokens needs it."""
        return PolicyTokenizer(self.of_run.policy.tokenizer_source)

    async def replay(self, chunk: RecordedChunk) -> Replay:
        try:
            found = await self.judge.ask(partial(self._request, chunk))
        except ValidationError:  # such as a text without tokens for a judge of tokens
            return Replay(chunk, None, reason="no_valid_request")
        if isinstance(found, JudgementFailure):
            return Replay(chunk, None, reason=found.reason, num_calls=found.num_calls)
        if len(found.rewards) != len(chunk.candidates):
            raise HeadwaterError(f"the judge answered {len(found.rewards)} rewards for {len(chunk.candidates)} texts")
        return Replay(chunk, Opinion(found.rewards, frozenset(found.barred)), num_calls=found.num_calls)

    def _request(self, chunk: RecordedChunk, with_token_ids: bool) -> JudgementRequest:
        """Token ids are made anew from the texts, which may be cut otherwise than they were sampled."""
        seed = seed_of(self.of_run.run.seed, WindowKey.parse(chunk.window_id), "judge")
        span = {"start": chunk.text_start, "end": chunk.text_end}
        if not with_token_ids:
            texts = tuple(JudgedText(text=candidate.text) for candidate in chunk.candidates)
            return JudgementRequest(text=chunk.text, items=(JudgementItem(candidates=texts, **span),), seed=seed)
        encode = self.tokenizer.encode
        prefix = (*self.tokenizer.opening, *encode(chunk.text[: chunk.text_start]))
        texts = tuple(JudgedText(text=one.text, token_ids=tuple(encode(one.text))) for one in chunk.candidates)
        item = JudgementItem(candidates=texts, token_start=len(prefix), **span)
        window = (*prefix, *encode(chunk.original))
        return JudgementRequest(text=chunk.text, token_ids=window, items=(item,), seed=seed)


def _shown(share: Share) -> str:
    if not share.number:
        return "-"
    low, high = share.interval
    return f"{share.mean:.3f}  ({low:.3f}-{high:.3f} of {share.number:,})"


def _flip_lines(flip: Flip) -> list[str]:
    texts = {
        "after": flip.chunk.text[: flip.chunk.text_start][-_SHOWN_CHARACTERS:],
        "chosen then": flip.chosen.text[:_SHOWN_CHARACTERS],
        "better now": flip.rejected.text[:_SHOWN_CHARACTERS],
    }
    head = f"window {flip.chunk.window_id} at {flip.chunk.start}, by {flip.gap:.2f}:"
    return [head, *(f"  {name:<11}  {' '.join(text.split())}" for name, text in texts.items())]

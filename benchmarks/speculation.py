"""N-gram speculative decoding (engine.ngram_tokens) on vLLM: what it does to a rewriter, whose answers mostly copy.

    LD_PRELOAD=.venv-vllm/lib/libiomp5.so .venv-vllm/bin/python -m benchmarks.speculation [--quick] [--json FILE]

The starter rewriter rewrites passages of 32 words, greedily: `copies` are answers that must repeat a faultless passage,
`repairs` those that must mend a spoiled one. One request after the other, and 32 at once. Tokens a CPU second count
answered tokens against the CPU time of this process and the engine core, which other processes on the machine do not
change. Tokens a step are what a row gains in one forward pass: 1 without guesses. vLLM
warns that guesses are slow on a CPU without Intel's OpenMP, which its build brings along.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

import starter
from benchmarks.report import Report, parser
from services.engine.base import Engine, Sampling
from services.engine.life import build_engine
from shared import metrics
from shared.engine_settings import EngineSettings
from starter.model import WordCodec, load_tokenizer
from starter.recipe.lessons import Lessons
from starter.world import World

MODELS = Path(starter.__file__).parent / "models"
GUESSES = (0, 4, 8)
AT_ONCE = 32
MAX_TOKENS = 48
LIMIT_S = 240.0


@dataclass(frozen=True)
class Passages:
    name: str
    prompts: Sequence[list[int]]


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    report = Report()
    loads = passages(num=32 if given.quick else 96)
    asyncio.run(compare(report, loads))
    return report.finish(given.json)


def passages(*, num: int) -> list[Passages]:
    codec = WordCodec(load_tokenizer(MODELS / "rewriter"))
    lessons, drawn = Lessons(World(0), codec), random.Random(0)
    prompts: dict[str, list[list[int]]] = {"copies": [], "repairs": []}
    while min(map(len, prompts.values())) < num:
        chunk = lessons.draw_chunk(drawn, clean_rate=0.5, heldout=True)
        if chunk is not None:
            name = "copies" if chunk.suffix == chunk.target else "repairs"
            prompts[name].append(lessons.rewriter_prompt(chunk)[0])
    return [Passages(name, of_name[:num]) for name, of_name in prompts.items()]


async def compare(report: Report, loads: Sequence[Passages]) -> None:
    answers: dict[str, list[tuple[int, ...]]] = {}
    for guesses in GUESSES:
        settings = {"kind": "vllm", "model": str(MODELS / "rewriter"), "kv_cache_gib": 0.5, "timeout_s": LIMIT_S}
        engine = build_engine(EngineSettings.model_validate(settings | {"ngram_tokens": guesses}))
        await engine.start()
        try:
            for load in loads:
                await ask(engine, load.prompts, at_once=AT_ONCE)  # the prefix cache then has every prompt
                for at_once in (1, AT_ONCE):
                    name = f"{load.name}, {at_once} at once, ngram_tokens = {guesses}"
                    found = await measure(report, name, engine, load, at_once=at_once)
                    report.figures[f"{name}: answers as without"] = _same(answers.setdefault(load.name, found), found)
        finally:
            await engine.close()


def _same(expected: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]]) -> float:
    """Share of equal answers. (Another batch rounds differently, which may tip a token.)"""
    return sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)


async def measure(report: Report, name: str, engine: Engine, load: Passages, *, at_once: int) -> list[tuple[int, ...]]:
    before, began = _accepted(), _cpu_seconds()
    answers = await ask(engine, load.prompts, at_once=at_once)
    seconds, accepted = _cpu_seconds() - began, _accepted() - before
    num_tokens = sum(map(len, answers))
    report.figures[f"{name}: tokens a CPU second"] = num_tokens / seconds
    report.figures[f"{name}: tokens a step"] = num_tokens / (num_tokens - accepted)
    return answers


async def ask(engine: Engine, prompts: Sequence[list[int]], *, at_once: int) -> list[tuple[int, ...]]:
    found = []
    for start in range(0, len(prompts), at_once):
        asked = prompts[start : start + at_once]
        answers = await engine.generate(asked, Sampling(max_tokens=MAX_TOKENS, temperature=0))
        found += [of_prompt[0].token_ids for of_prompt in answers]
    return found


def _accepted() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_engine_accepted_tokens_total") or 0.0


def _cpu_seconds() -> float:
    """Of this process and those it started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


if __name__ == "__main__":
    raise SystemExit(main())

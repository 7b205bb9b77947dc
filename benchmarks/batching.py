"""The batching of our `transformers` engine against transformers' own continuous batching (ContinuousBatchingManager).

    .venv/bin/python -m benchmarks.batching [--quick] [--json FILE]

Two loads on one thread in float32, each for the starter policy (0.7 million parameters) and for a random Llama of 54
million. `rollouts`: four samples of each of eight prefixes of one document, all equally long. `answers`: 24 prompts of
any length that want answers of any length, which is what continuous batching is for: a row that ends makes room for the
next. Both sample at temperature 1 and never stop early. Tokens a CPU second count sampled tokens against the CPU time
of this process, which other processes on the machine do not change.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import starter
from benchmarks.report import Report, parser
from services.engine.base import Engine, Sampling
from services.engine.life import build_engine
from shared.engine_settings import EngineSettings

POLICY = Path(starter.__file__).parent / "models" / "policy"
VOCABULARY = 514
LIMIT_S = 240.0
CACHE_SHARE, PAGE = 0.05, 32
"""The manager's keys and values: share of the free memory, and tokens of a page, which are what prompts share."""


@dataclass(frozen=True)
class Load:
    prompts: Sequence[list[int]]
    lengths: Sequence[int]
    """New tokens of each prompt."""
    num_samples: int = 1

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths) * self.num_samples


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    report = Report()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="headwater-batching-") as folder:
        models = {"starter policy": endless(POLICY, Path(folder) / "policy"), "54M": big_model(Path(folder) / "big")}
        for name, model in models.items():
            compare(report, name, model, repetitions=1 if given.quick else 3)
    return report.finish(given.json)


def loads() -> dict[str, Load]:
    drawn = random.Random(0)
    document = [drawn.randrange(3, VOCABULARY) for _ in range(256)]
    answers = [[drawn.randrange(3, VOCABULARY) for _ in range(drawn.randrange(20, 200))] for _ in range(24)]
    return {
        "rollouts": Load([document[: 32 * chunk] for chunk in range(1, 9)], [32] * 8, num_samples=4),
        "answers": Load(answers, [drawn.randrange(4, 96) for _ in answers]),
    }


def endless(model: Path, folder: Path) -> Path:
    """A copy without an end of sequence: every row is as long as it was asked to be."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.eos_token_id = loaded.generation_config.eos_token_id = None
    return _saved(loaded, folder)


def big_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _saved(LlamaForCausalLM(config), folder)  # type: ignore[no-untyped-call]


def _saved(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
    return folder


def compare(report: Report, name: str, model: Path, *, repetitions: int) -> None:
    with asyncio.Runner() as loop:
        settings = {"model": str(model), "device": "cpu", "num_threads": 1, "timeout_s": LIMIT_S}
        engine = build_engine(EngineSettings.model_validate(settings))
        loop.run(engine.start())
        module: Any = AutoModelForCausalLM.from_pretrained(model)
        for load_name, load in loads().items():
            rates: dict[str, list[float]] = {"ours": [], "theirs": []}
            with continuous_batching(module, load) as manager:
                for _ in range(repetitions):
                    rates["ours"].append(tokens_a_second(partial(_run, loop, engine, load)))
                    rates["theirs"].append(tokens_a_second(partial(ask_theirs, manager, load)))
            for whose, found in rates.items():
                report.figures[f"{name}, {load_name}, {whose}: tokens a CPU second"] = statistics.median(found)
        loop.run(engine.close())


def tokens_a_second(ask: Callable[[], int]) -> float:
    began = time.process_time()
    return ask() / (time.process_time() - began)


def _run(loop: asyncio.Runner, engine: Engine, load: Load) -> int:
    return loop.run(ask_ours(engine, load))


async def ask_ours(engine: Engine, load: Load) -> int:
    """The number of sampled tokens. Each prompt is a request of its own, as a judge's are."""
    asked = [
        engine.generate([prompt], Sampling(max_tokens=length, num_samples=load.num_samples, seed=row))
        for row, (prompt, length) in enumerate(zip(load.prompts, load.lengths, strict=True))
    ]
    answers = await asyncio.gather(*asked)
    return _checked(load, sum(len(one.token_ids) for of_one in answers for of_prompt in of_one for one in of_prompt))


@contextmanager
def continuous_batching(module: Any, load: Load) -> Iterator[Any]:
    """A running manager. The number of samples is one for all of its requests."""
    sampling = {"do_sample": True, "eos_token_id": -1, "num_return_sequences": load.num_samples}
    options = GenerationConfig(**sampling)  # type: ignore[no-untyped-call]
    batching = ContinuousBatchingConfig(seed=0, max_memory_percent=CACHE_SHARE, page_size=PAGE)
    manager = module.init_continuous_batching(generation_config=options, continuous_batching_config=batching)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)


def ask_theirs(manager: Any, load: Load) -> int:
    # The longest first, so that its beginnings find their pages.
    for prompt, length in sorted(zip(load.prompts, load.lengths, strict=True), reverse=True):
        manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
    return _checked(load, _collect(manager, len(load.prompts) * load.num_samples))


def _collect(manager: Any, num_rows: int) -> int:
    """The number of tokens of the rows' answers."""
    num_tokens = num_ended = 0
    until = time.monotonic() + LIMIT_S
    while num_ended < num_rows:
        assert manager.is_running(), "continuous batching has ended"
        assert time.monotonic() < until, "continuous batching gave no answer"
        answer = manager.get_result(timeout=1)
        if answer is not None and answer.is_finished():
            num_tokens, num_ended = num_tokens + len(answer.generated_tokens), num_ended + 1
    return num_tokens


def _checked(load: Load, num_tokens: int) -> int:
    assert num_tokens == load.num_tokens, f"{num_tokens} tokens instead of {load.num_tokens}: a row ended early"
    return num_tokens


if __name__ == "__main__":
    raise SystemExit(main())

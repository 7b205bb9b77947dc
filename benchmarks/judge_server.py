"""The real judge over a simulated engine: a process of benchmarks/judge.py and benchmarks/goodput.py.

    python -m benchmarks.judge_server PORT '{"settings": {...}, "engine": {"rate": 400, "latency_s": 2}}'

`GET /benchmark` shows what the process and its engine have done, and begins a new stretch for the longest block.
"""

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.engine.base import Generation, Prompt, Sampling, TokenSequence, WordOdds
from services.judge.app import build_app
from shared.errors import EngineError
from shared.http import build_server, listen
from shared.settings import Secrets, Settings

_TICK_S = 0.005
_BEAT_S = 0.001
_REASONING = "The first one follows the text before it; the second one changes its subject.\nVerdict: "


@dataclass(frozen=True)
class EngineOptions:
    tokenizer: str
    """Folder with a tokenizer.json."""
    grades: bool = False
    rate: float = 0.0
    """Calls a second that it can serve; 0: it answers at once."""
    latency_s: float = 0.0
    """Of a call that is served."""
    error_rate: float = 0.0
    """Share of the served calls that end in an EngineError."""


class SimulatedEngine:
    """Verdicts are coin flips by the seed of the question. A call that is cancelled before it is served costs nothing.

    As the engines that run a model here, it takes token ids as they are and tokenises texts itself.
    """

    name = "simulated"
    weight_version = 0
    can_score = has_tokenizer = True
    can_constrain = has_chat_template = False

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        path = str(Path(options.tokenizer) / "tokenizer.json")
        self._ours, self._content = Tokenizer.from_file(path), Tokenizer.from_file(path)
        self._content.encode_special_tokens = True  # text that spells a control token stays text
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._random = random.Random(0)
        self.can_grade = options.grades
        self.num_served = self.num_errors = 0

    async def start(self) -> None:
        self._clock = asyncio.create_task(self._serve()) if self._options.rate else None

    async def close(self) -> None:
        if self._clock:
            self._clock.cancel()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        for text in prompts:
            if isinstance(text, str):
                self.encode(text)
        await self._take_turn()
        return [
            [self._answer(sampling, sampling.seed + row + index) for index in range(sampling.num_samples)]
            for row, _ in enumerate(prompts)
        ]

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        await self._take_turn()
        return [[math.log(self._random.uniform(0.1, 1.0))] for _ in continuations]

    def encode(self, text: str) -> list[int]:
        return list(self._ours.encode(text, add_special_tokens=False).ids)

    def encode_content(self, text: str) -> list[int]:
        return list(self._content.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: TokenSequence) -> str:
        return str(self._ours.decode(list(token_ids)))

    def render_chat(self, prompt: str) -> str:
        raise EngineError("the simulated engine has no chat template")

    async def load_weights(self, folder: Path, version: int) -> None:
        raise EngineError("the simulated engine has no weights")

    async def _take_turn(self) -> None:
        if self._options.rate:
            served: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(served)
            await served
            await asyncio.sleep(self._options.latency_s)
        else:
            await asyncio.sleep(0)
            self.num_served += 1
        if self._random.random() < self._options.error_rate:
            self.num_errors += 1
            raise EngineError("the simulated engine failed")

    async def _serve(self) -> None:
        """`rate` calls a second, in order of arrival. What it could not use while nobody waited is lost."""
        allowed, then = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            allowed, then = allowed + self._options.rate * (now - then), now
            while allowed >= 1 and self._waiting:
                served = self._waiting.popleft()
                if not served.done():
                    served.set_result(None)
                    self.num_served += 1
                    allowed -= 1
            if not self._waiting:
                allowed = 0.0

    def _answer(self, sampling: Sampling, seed: int) -> Generation:
        word = "A" if seed % 2 else "B"
        odds: tuple[WordOdds, ...] = ()
        if sampling.words:
            log_probs = tuple(math.log(0.6 if other == word else 0.1) for other in sampling.words)
            odds = (WordOdds(len(_REASONING), log_probs),)
        return Generation((), _REASONING + word, "stop", 0, word_odds=odds)


class Heartbeat:
    """How long the event loop stood still."""

    longest_s = longest_cpu_s = 0.0

    async def watch(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(_BEAT_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - wall - _BEAT_S)
            self.longest_cpu_s = max(self.longest_cpu_s, time.thread_time() - cpu)

    def take(self) -> dict[str, float]:
        """Since the last time. `longest_cpu_s`: of the loop's thread, so that a busy machine does not count."""
        found = {"longest_block_s": self.longest_s, "longest_block_cpu_s": self.longest_cpu_s}
        self.longest_s = self.longest_cpu_s = 0.0
        return found


async def serve(port: int, settings: Settings, engine: SimulatedEngine) -> None:
    app = build_app(settings, Secrets(), engine=engine)
    heart = Heartbeat()

    @app.get("/benchmark")
    async def benchmark() -> dict[str, float]:
        counts = {"num_served": engine.num_served, "num_errors": engine.num_errors}
        return heart.take() | counts | {"cpu_s": time.process_time()}

    server = build_server(app)
    async with app.router.lifespan_context(app), _running(heart):
        await server.serve(listen("127.0.0.1", port, setting="port"))


@contextlib.asynccontextmanager
async def _running(heart: Heartbeat) -> AsyncIterator[None]:
    task = asyncio.create_task(heart.watch())
    try:
        yield
    finally:
        task.cancel()


def command(port: int, settings: dict[str, Any], options: EngineOptions) -> list[str]:
    """To start this process with."""
    given = json.dumps({"settings": settings, "engine": asdict(options)})
    return [sys.executable, "-m", "benchmarks.judge_server", str(port), given]


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    simulated = SimulatedEngine(EngineOptions(**given["engine"]))
    asyncio.run(serve(int(sys.argv[1]), Settings.model_validate(given["settings"]), simulated))

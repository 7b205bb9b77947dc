"""A real Redis, a tiny random policy, and one run of the trainer on both."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import redis
import sqlalchemy as sa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from cli.audit import audit_run
from cli.run_folder import RunFolder
from shared.coordination import Coordination
from shared.database import StepRow, transaction
from shared.ledger import Ledger, WindowStart
from shared.records import Lease, ScoredWindow
from shared.retries import Retries
from shared.runs import Run, open_run
from shared.settings import Settings
from shared.stream import WindowStream
from tests import tiny_llama as llama
from tests.services.collector.processes import RedisProcess
from tests.trainer.windows import plain_window
from trainer.assembly import prepare, train
from trainer.lead import Lead
from trainer.loop import Trainer

VOCABULARY = 32


def tiny_llama(seed: int = 0, *, tie: bool = True) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return llama.tiny_llama(VOCABULARY, seed=seed, initializer_range=0.3, tie_word_embeddings=tie, **shape, **special)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And short waits for an empty stream."""
    torch.set_num_threads(1)
    monkeypatch.setattr("trainer.connections._BLOCK_S", 0.05)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@dataclass
class Stack:
    """One run: its settings, and the collector's side of stream and ledger."""

    settings: Settings
    client: Any
    """Of Redis."""
    stream: WindowStream
    coordination: Coordination
    records: Run
    trainers: list[Trainer] = field(default_factory=list)
    """Prepared in this process. The next one stands for a start after the end of the one before it."""

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

    def write_plain(self, numbers: Iterable[int]) -> None:
        """Windows of three pairs each."""
        self.write(plain_window(number, run=self.run) for number in numbers)

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

    def with_settings(self, section: str, **changes: Any) -> "Stack":
        """The same run with other settings."""
        data = self.settings.model_dump()
        data[section] |= changes
        return replace(self, settings=Settings.model_validate(data))

    def prepare(self, retries: Retries | None = None) -> Trainer:
        self.end_trainers()
        trainer = prepare(self.settings, retries or Retries())
        assert trainer is not None
        self.trainers.append(trainer)
        return trainer

    def prepare_lead(self, retries: Retries | None = None) -> Lead:
        lead = self.prepare(retries).lead
        assert lead is not None
        return lead

    def end_trainers(self) -> None:
        """As the end of their processes does: their lease is free."""
        while self.trainers:
            self.trainers.pop().close()

    def train(self, stop: Event | None = None) -> None:
        self.end_trainers()
        train(self.settings, stop or Event())

    @property
    def checkpoints(self) -> Path:
        return self.settings.run.folder / "checkpoints"

    def weights_at(self, step: int) -> dict[str, torch.Tensor]:
        return dict(AutoModelForCausalLM.from_pretrained(self.checkpoints / f"step-{step:08d}/policy").state_dict())

    def rows(self, table: Any = StepRow) -> list[Any]:
        """In the order of its key."""
        with transaction(self.records.database) as session:
            rows = list(session.scalars(sa.select(table).order_by(*sa.inspect(table).primary_key)))
            session.expunge_all()
        return rows

    def figures(self) -> list[dict[str, float]]:
        return [row.figures for row in self.rows()]

    def counts(self) -> tuple[int, dict[str, int], int]:
        """Windows trained, dropped by reason, in flight."""
        balance = self.ledger.balance()
        return balance.trained, balance.dropped, balance.in_flight

    def report(self) -> tuple[int, int, str]:
        """Step, weight version and state that the trainer last reported."""
        report = self.coordination.trainer_report()
        assert report is not None
        return report.step, report.weight_version, report.state


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def build_stack(
    directory: Path,
    policy: Path,
    redis_url: str,
    *,
    run: str = "run",
    database_url: str = "",
    num_parts: int = 1,
    **trainer: Any,
) -> Stack:
    """A new run. Without a `database_url` it has its own SQLite."""
    defaults = {"steps": 4, "pairs_per_step": 4, "warmup_steps": 0, "learning_rate": 0.01, "log_tensorboard": False}
    settings = Settings.model_validate(
        {
            "run": {"name": run, "directory": directory},
            "policy": {"model": str(policy)},
            "redis": {"url": redis_url},
            "database": {"url": database_url},
            "documents": {"num_parts": num_parts},
            "chunks": {"context_tokens": 64, "suffix_tokens": 4, "min_prefix_tokens": 4, "min_suffix_tokens": 1},
            "trainer": defaults | {"device": "cpu", "stream_timeout_s": 30.0} | trainer,
        }
    )
    client = redis.Redis.from_url(redis_url)
    stack = Stack(settings, client, WindowStream(client, run), Coordination(client, run), open_run(settings))
    stack.stream.create()
    return stack


MakeStack = Callable[..., Stack]


@pytest.fixture
def make_stack(redis_server: RedisProcess, policy_folder: Path, tmp_path: Path) -> Iterator[MakeStack]:
    """`make_stack(name, **trainer settings)`; names keep the runs of one test apart."""

    made: list[Stack] = []

    def make(name: str = "run", **options: Any) -> Stack:
        run = f"{tmp_path.name}-{name}"[-60:].lstrip("-_.")
        made.append(build_stack(tmp_path, policy_folder, redis_server.url, run=run, **options))
        return made[-1]

    yield make
    for stack in made:
        stack.end_trainers()

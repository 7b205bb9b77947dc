"""Fixtures of the collector's tests: a Redis server, a tokenizer, and settings that bind them together."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.collector.windows import PolicyTokenizer
from shared.settings import Settings
from tests.services.collector.processes import RedisProcess
from tests.services.collector.runs import write_documents

SAMPLE = "The moon moves around the earth in about twenty-seven days. Water boils at a lower heat on high mountains."


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens without BOS; `</s>` is special."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=False)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PolicyTokenizer:
    return PolicyTokenizer(str(tokenizer_folder))


def build_tokenizer(folder: Path, *, adds_bos: bool) -> Path:
    make_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


def make_tokenizer(*, adds_bos: bool) -> Any:
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([SAMPLE], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    if adds_bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        bpe._tokenizer.post_processor = template
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """Shared by tests; each uses a run name of its own."""
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_settings(tmp_path: Path, redis_server: RedisProcess, tokenizer_folder: Path) -> Callable[..., Settings]:
    """`make_settings(url, documents={...}, collector={...})`: 8 documents, quick retries, the services at `url`."""
    run, path = f"run-{uuid.uuid4().hex[:12]}", write_documents(tmp_path / "documents.jsonl", 8)

    def make(url: str, **sections: dict[str, Any]) -> Settings:
        data: dict[str, dict[str, Any]] = {
            "run": {"name": run, "directory": str(tmp_path)},
            "policy": {"model": str(tokenizer_folder)},
            "redis": {"url": redis_server.url, "timeout_s": 2},
            "chunks": {"context_tokens": 32, "suffix_tokens": 8, "min_prefix_tokens": 8, "min_suffix_tokens": 4},
            "rollout": {"url": url},
            "rewriter": {"url": url},
            "judge": {"url": url},
            "documents": {"path": str(path), "shuffle_buffer": 4, "max_epochs": 1},
            "collector": {"port": 0, "max_backoff_s": 0.3, "lease_s": 1.5, "max_backlog": 1000, "record_share": 1.0},
        }
        data["collector"]["schedule"] = [{"num_rollouts": 2}]
        for name, values in sections.items():
            data[name] = data.get(name, {}) | values
        return Settings.model_validate(data)

    return make

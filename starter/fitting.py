"""The one training loop of the recipe: any stage, resumable from its last checkpoint to the same result."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from starter.optim import build_optimizers

NUM_TAGS = 7
IGNORE = -100
CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Row:
    """One training sequence."""

    ids: list[int]
    labels: dict[int, int]
    """Position -> token that should come next after it."""
    tags: dict[int, int] = field(default_factory=dict)
    """Position -> what the tagger should say of the token there (training only)."""


class Tagger(nn.Module):
    """The auxiliary head: says of each token, from the last layer but one, which fault begins there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, NUM_TAGS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stage:
    name: str
    num_steps: int
    lr: float
    batch: Callable[[int], Sequence[Row]]
    """Rows of a step, by its number alone, so that a resumed stage sees the same data."""
    tag_weight: float = 1.0
    report: Callable[[LlamaForCausalLM], str] | None = None


def fit(
    stage: Stage,
    model: LlamaForCausalLM,
    tagger: Tagger,
    *,
    folder: Path,
    tell: Callable[[str], None],
    device: str = "cpu",
) -> float:
    """Trains model and tagger in place; returns the seconds spent, those before a restart included."""
    nn.Module.to(model, torch.device(device))
    model.train()
    tagger.to(device)
    optimizers = build_optimizers([model, tagger], lr=stage.lr)
    first, spent = _resume(folder, model, tagger, optimizers)
    start = saved = told = time.monotonic()
    for step in range(first, stage.num_steps):
        for optimizer in optimizers:
            _set_rate(optimizer, step / stage.num_steps, stage.lr)
        loss, tag_loss = _step(model, tagger, optimizers, stage.batch(step), stage.tag_weight, device)
        now = time.monotonic()
        if now - told > 15 or step + 1 == stage.num_steps:
            note = f" {stage.report(model)}" if stage.report else ""
            rate = (step + 1 - first) / (now - start)
            tell(f"{stage.name} {step + 1}/{stage.num_steps} loss {loss:.4f} tags {tag_loss:.4f} {rate:.2f}/s{note}")
            told = time.monotonic()
        if now - saved > CHECKPOINT_EVERY_S:
            _save(folder, model, tagger, optimizers, step=step + 1, spent=spent + now - start)
            saved = now
    nn.Module.eval(model)
    return spent + time.monotonic() - start


def collate(rows: Sequence[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, labels and tags, each (B, T); causal attention needs no mask for padding on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    tags = torch.full_like(ids, IGNORE)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, list(row.labels)] = torch.tensor(list(row.labels.values()), dtype=torch.long)
        tags[index, list(row.tags)] = torch.tensor(list(row.tags.values()), dtype=torch.long)
    return ids.to(device), labels.to(device), tags.to(device)


def _step(
    model: LlamaForCausalLM,
    tagger: Tagger,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Sequence[Row],
    tag_weight: float,
    device: str,
) -> tuple[float, float]:
    ids, labels, tags = collate(rows, device)
    hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    wanted = labels != IGNORE
    loss = F.cross_entropy(model.lm_head(hidden.last_hidden_state[wanted]), labels[wanted])
    tagged = tags != IGNORE
    tag_loss = torch.zeros(())
    if tag_weight and bool(tagged.any()):
        tag_loss = F.cross_entropy(tagger(hidden.hidden_states[-2][tagged]), tags[tagged])
    torch.autograd.backward(loss + tag_weight * tag_loss)
    nn.utils.clip_grad_norm_([*model.parameters(), *tagger.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(tag_loss.detach())


def _set_rate(optimizer: torch.optim.Optimizer, progress: float, lr: float) -> None:
    """A short warm-up, flat, then down to a twentieth over the last 60 %."""
    base = optimizer.defaults["lr"]
    factor = min(1.0, progress / 0.02 + 0.05, 0.05 + 0.95 * (1 - progress) / 0.6)
    for group in optimizer.param_groups:
        group["lr"] = base * factor


def _save(
    folder: Path,
    model: LlamaForCausalLM,
    tagger: Tagger,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    spent: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors |= {f"tagger.{name}": tensor for name, tensor in tagger.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    progress = {"step": str(step), "spent": f"{spent:.3f}"}
    written = folder / "checkpoint.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written, metadata=progress)
    (folder / "progress.tmp").write_text(json.dumps(progress), encoding="utf-8")
    written.rename(folder / "checkpoint.safetensors")
    (folder / "progress.tmp").rename(folder / "progress.json")


def _resume(
    folder: Path, model: LlamaForCausalLM, tagger: Tagger, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, float]:
    if not (folder / "progress.json").is_file():
        return 0, 0.0
    tensors = load_file(folder / "checkpoint.safetensors")
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    tagger.load_state_dict({n[7:]: tensor for n, tensor in tensors.items() if n.startswith("tagger.")})
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(progress["step"]), float(progress["spent"])

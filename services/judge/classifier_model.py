"""A sequence classifier or reward model with its forward pass. Imported and used by one thread (classifier.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from services.engine.base import Tokens
from services.tokenizer import TokenCodec, from_transformers
from shared.engine_settings import EngineSettings
from shared.errors import SettingsError

_CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer's mean over a long text: of a longer prefix only the end is encoded."""


@dataclass(frozen=True)
class ClassifierModel:
    module: Any
    codec: TokenCodec
    device: torch.device
    head: Tokens
    """Special tokens before every text, such as [CLS] or a BOS."""
    tail: Tokens
    pad: int | None
    """None: the model would take any padding for text, so only rows of one length share a batch."""
    max_tokens: int
    max_batch_tokens: int
    label: int | None
    """The class whose probability is wanted; None: the model's one output."""

    @property
    def room(self) -> int:
        """Tokens for prefix and candidate."""
        return self.max_tokens - len(self.head) - len(self.tail)

    def rows(self, prefix: str, candidates: Sequence[str]) -> tuple[list[Tokens], int]:
        """The inputs, and how many candidates had to be cut. An input is empty where there is no text at all.

        The prefix gives way to the candidate: its last tokens that fit are kept. No text becomes a special token.
        """
        before = self.codec.encode(prefix[-self.room * _CHARACTERS_PER_TOKEN :]) if prefix else []
        encode = self.codec.encode_continuation if prefix else self.codec.encode
        encoded = [encode(candidate) for candidate in candidates]
        rows = [self._row(before, token_ids) for token_ids in encoded]
        return rows, sum(len(token_ids) > self.room for token_ids in encoded)

    def _row(self, before: Sequence[int], candidate: Sequence[int]) -> Tokens:
        kept = candidate[: self.room]
        text = (*before[max(0, len(before) + len(kept) - self.room) :], *kept)
        return (*self.head, *text, *self.tail) if text else ()

    def outputs(self, rows: Sequence[Tokens]) -> list[float | None]:
        """Of each row the probability of the class, or the model's one output. None where a row failed by itself or
        gave no finite number. Raises the model's error if every row failed."""
        found: list[float | None] = [None] * len(rows)
        errors: list[Exception] = []
        for batch in self._batches(rows):
            try:
                values = self._forward([rows[place] for place in batch])
            except (RuntimeError, IndexError, ValueError) as exc:
                values = self._one_by_one([rows[place] for place in batch], errors, first=exc)
            for place, value in zip(batch, values, strict=True):
                found[place] = value
        if errors and len(errors) == len(rows):
            raise errors[0]
        return found

    def _one_by_one(self, rows: Sequence[Tokens], errors: list[Exception], *, first: Exception) -> list[float | None]:
        if len(rows) == 1:
            errors.append(first)
            return [None]
        values: list[float | None] = []
        for row in rows:
            try:
                values += self._forward([row])
            except (RuntimeError, IndexError, ValueError) as exc:
                errors.append(exc)
                values.append(None)
        return values

    def _batches(self, rows: Sequence[Tokens]) -> Iterator[list[int]]:
        """Places of rows of similar length, within `max_batch_tokens` with their padding."""
        batch: list[int] = []
        for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
            longest = len(rows[place])  # the rows come by length
            uneven = self.pad is None and batch and len(rows[batch[0]]) != longest
            if batch and (uneven or (len(batch) + 1) * longest > self.max_batch_tokens):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Tokens]) -> list[float | None]:
        width = max(map(len, rows))
        padded = [[*row, *[self.pad or 0] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        ids, seen = torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)
        logits: Tensor = self.module(input_ids=ids, attention_mask=seen).logits.float()  # (R, classes)
        values = logits[:, 0] if self.label is None else self._probabilities(logits)[:, self.label]
        finite = torch.isfinite(values).tolist()
        return [value if good else None for value, good in zip(values.tolist(), finite, strict=True)]

    def _probabilities(self, logits: Tensor) -> Tensor:
        several_at_once = self.module.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if several_at_once else logits.softmax(-1)


def load_classifier(name: str, model: str, *, label: str, settings: EngineSettings) -> ClassifierModel:
    """Of the criterion `name`. SettingsError if the model can't be used or `label` is none of its classes."""
    setting = f"judge.criteria.{name}.model"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"{setting} runs on engine.device = 'cuda', but torch sees no CUDA device: use 'auto'")
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        module, loading = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, settings.dtype), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"{setting} = {model!r} can't be loaded as a sequence classifier: {exc}") from exc
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them at random
        raise SettingsError(f"{setting} = {model!r} is no trained classifier: its weights lack {missing[0]!r}")
    head, tail = _around(tokenizer)
    pad = None if tokenizer.pad_token_id in (*head, *tail, tokenizer.unk_token_id) else tokenizer.pad_token_id
    for config in (module.config, module.config.get_text_config()):
        config.pad_token_id = -1 if pad is None else pad  # by it decoders find the last token of a row
    module.to(device).eval()
    return ClassifierModel(
        module=module,
        codec=TokenCodec(from_transformers(tokenizer)),
        device=device,
        head=head,
        tail=tail,
        pad=pad,
        max_tokens=min(_model_tokens(module), tokenizer.model_max_length, settings.max_batch_tokens),
        max_batch_tokens=settings.max_batch_tokens,
        label=_class(name, label, module.config),
    )


def _class(name: str, label: str, config: Any) -> int | None:
    setting, classes = f"judge.criteria.{name}.label", {word: place for place, word in config.id2label.items()}
    if config.num_labels == 1:
        if label:
            raise SettingsError(f"{setting} = {label!r}, but the model has one output: leave the label empty")
        return None
    if label not in classes:
        named = f"= {label!r} is no class of the model" if label else "is empty, but the model has several classes"
        raise SettingsError(f"{setting} {named}: set it to one of {', '.join(map(repr, classes))}")
    return int(classes[label])


def _around(tokenizer: Any) -> tuple[Tokens, Tokens]:
    """The special tokens that the tokenizer puts before and after a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def _model_tokens(module: Any) -> int:
    """Longest input. RoBERTa's kind counts positions from its padding token on."""
    longest = getattr(module.config.get_text_config(), "max_position_embeddings", None) or 2**31
    embeddings = getattr(getattr(module.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return int(longest) - (0 if padding is None else padding + 1)

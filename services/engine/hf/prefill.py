"""What a model computes before it continues prompts, and the cache of keys and values it continues them in.

Shared tokens are computed once. If one prompt is the beginning of another (the chunks of a document), only the longer
one is run. A long beginning that prompts share (the questions about a chunk's candidates) is run once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from services.engine.base import Tokens

MIN_SAVED_TOKENS = 64
"""A shared beginning gets its own forward pass if that saves at least this many tokens."""


@dataclass(frozen=True)
class Branch:
    token_ids: Tokens
    """To run from the end of the stem on."""
    prompts: tuple[Tokens, ...]
    """The prompts that are beginnings of `token_ids` and longer than the stem."""
    stem: Tokens = ()
    """`token_ids` of the branch that this one continues."""


def plan_branches(prompts: Iterable[Tokens]) -> list[list[Branch]]:
    """Branches by level, longest first: level 0 has no stems, level n continues branches of level n - 1.

    Every distinct prompt belongs to exactly one branch.
    Example: (1, 2), (1, 2, 3), (7,) -> one level: (1, 2, 3) with two prompts and (7,) with one.
    """
    left = set(prompts)
    lengths = sorted({len(prompt) for prompt in left}, reverse=True)
    levels: list[list[Branch]] = []
    for level, stem, token_ids in _grow(left):
        inside = [token_ids[:length] for length in lengths if len(stem) < length <= len(token_ids)]
        own = tuple(prompt for prompt in inside if prompt in left)
        left.difference_update(own)
        if level == len(levels):
            levels.append([])
        levels[level].append(Branch(token_ids, own, stem))
    return [sorted(level, key=lambda branch: -len(branch.token_ids)) for level in levels]


def _grow(prompts: Iterable[Tokens]) -> Iterator[tuple[int, Tokens, Tokens]]:
    """(level, stem, tokens) of every branch; stems come before the branches that continue them."""
    ordered = sorted(prompts)
    # In sorted order, a prompt that is the beginning of any other is the beginning of the next one.
    ends = [prompt for prompt, after in pairwise(ordered) if after[: len(prompt)] != prompt] + ordered[-1:]
    left: list[tuple[list[Tokens], Tokens, int]] = [(ends, (), 0)] if ends else []
    while left:
        group, stem, level = left.pop()
        if len(group) == 1:
            yield level, stem, group[0]
            continue
        shared = _common_length(group[0], group[-1])
        if (len(group) - 1) * (shared - len(stem)) >= MIN_SAVED_TOKENS:
            yield level, stem, group[0][:shared]
            stem, level = group[0][:shared], level + 1
        parted = [list(alike) for _, alike in groupby(group, key=lambda end: end[shared])]
        left.extend((alike, stem, level) for alike in reversed(parted))


def _common_length(first: Tokens, last: Tokens) -> int:
    """How long a beginning all sequences between two in sorted order share."""
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def pack(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[range]:
    """Runs of rows that fit into one padded batch; `lengths` must descend. A row that is too long runs alone.

    Example: lengths (5, 5, 2), max_tokens 10 -> rows 0..1, row 2.
    """
    runs: list[range] = []
    start = 0
    while start < len(lengths):
        rows = max(1, min(max_tokens // lengths[start], max_rows or len(lengths), len(lengths) - start))
        runs.append(range(start, start + rows))
        start += rows
    return runs


Layers = list[tuple[Tensor, Tensor]]
"""Keys and values per layer."""


@dataclass(frozen=True)
class PrefilledPrompt:
    trunk: Layers
    """Per layer (heads, T, head_dim) of the branch that the prompt begins; T >= length."""
    length: int
    logits: Tensor
    """(V,) float32, of the token after the prompt."""


class RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values (R, heads, capacity, head_dim), of which the first `length` columns are filled."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._all_keys, self._all_values = keys, values
        self.length = length
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self._all_keys[:, :, self.length : end] = key_states
        self._all_values[:, :, self.length : end] = value_states
        self.length = end
        return self._all_keys[:, :, :end], self._all_values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def of_row(self, row: int, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, T, head_dim) of one row, from column `first`."""
        return self._all_keys[row, :, first : self.length], self._all_values[row, :, first : self.length]

    def select(self, rows: Tensor) -> None:
        self._all_keys = self._all_keys.index_select(0, rows)
        self._all_values = self._all_values.index_select(0, rows)


class RowCache:
    """R rows that continue prefilled prompts, each with room for `room` more tokens.

    Rows are padded on the left, so that all of them write the same next column. Positions were applied to the keys at
    prefill, so the beginning of a branch may be copied to any column.
    """

    def __init__(self, prompts: Sequence[PrefilledPrompt], *, room: int) -> None:
        self._width = max(prompt.length for prompt in prompts)
        device = prompts[0].logits.device
        self.lengths = torch.tensor([prompt.length for prompt in prompts], device=device)
        """(R,) tokens of each row's prompt."""
        # Neighbouring rows that continue the same prompt are copied together.
        runs = [list(alike) for _, alike in groupby(enumerate(prompts), key=lambda pair: id(pair[1]))]
        self._layers = [self._lay(runs, layer, len(prompts), room) for layer in range(len(prompts[0].trunk))]
        self.cache = Cache(layers=list(self._layers))
        columns = torch.arange(self._width + room, device=device)
        self._visible = columns[None, :] >= (self._width - self.lengths)[:, None]
        self._padded = min(prompt.length for prompt in prompts) < self._width

    def mask(self, num_new: int) -> Tensor | None:
        """(R, columns) bool for a forward pass over `num_new` more columns; None if no row is padded."""
        return self._visible[:, : self._layers[0].length + num_new] if self._padded else None

    def positions(self, num_new: int) -> Tensor:
        """(R, num_new) of the next columns."""
        filled = self._layers[0].length - self._width
        return (self.lengths + filled)[:, None] + torch.arange(num_new, device=self.lengths.device)

    def layers_of(self, row: int) -> Layers:
        """One row's keys and values, without its left padding."""
        first = self._width - int(self.lengths[row])
        return [layer.of_row(row, first) for layer in self._layers]

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self.lengths, self._visible = self.lengths[rows], self._visible[rows]
        for layer in self._layers:
            layer.select(rows)

    def _lay(self, runs: list[list[tuple[int, PrefilledPrompt]]], layer: int, num_rows: int, room: int) -> RowLayer:
        both: list[Tensor] = []
        for which in (0, 1):
            like = runs[0][0][1].trunk[layer][which]
            laid = like.new_zeros((num_rows, like.shape[0], self._width + room, like.shape[2]))
            for run in runs:
                first, prompt = run[0]
                columns = slice(self._width - prompt.length, self._width)
                laid[first : first + len(run), :, columns] = prompt.trunk[layer][which][:, : prompt.length]
            both.append(laid)
        return RowLayer(both[0], both[1], self._width)

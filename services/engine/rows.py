"""Keys and values of rows being continued: laid out once from prefilled trunks, then written in place.

Rows are padded on the left, so that all rows write the same next column. Positions were applied to the keys at
prefill, so a beginning of a trunk may be laid anywhere. Used by decoding.py and model.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values per layer."""


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt whose keys, values and next-token logits are known."""

    trunk: Layers
    """Per layer (heads, T, head_dim) of the trunk that it begins; T >= length."""
    length: int
    logits: Tensor
    """(V,) float32: the model's view of the token after the prompt."""


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
        """Keys and values (heads, T, head_dim) of one row from column `first` on."""
        return self._all_keys[row, :, first : self.length], self._all_values[row, :, first : self.length]

    def select(self, rows: Tensor) -> None:
        self._all_keys = self._all_keys.index_select(0, rows)
        self._all_values = self._all_values.index_select(0, rows)


class RowCache:
    """R rows that continue prefilled prompts, with room for `room` more tokens each."""

    def __init__(self, prompts: Sequence[PrefilledPrompt], *, room: int) -> None:
        self._width = max(prompt.length for prompt in prompts)
        device = prompts[0].logits.device
        self.lengths = torch.tensor([prompt.length for prompt in prompts], device=device)
        """(R,) tokens of each row's prompt."""
        runs = _runs(prompts)
        layers = [self._lay(runs, layer, len(prompts), room) for layer in range(len(prompts[0].trunk))]
        self.cache = Cache(layers=list(layers))
        self._layers = layers
        columns = torch.arange(self._width + room, device=device)
        self._visible = columns[None, :] >= (self._width - self.lengths)[:, None]
        self._padded = min(prompt.length for prompt in prompts) < self._width

    def mask(self, num_new: int) -> Tensor | None:
        """(R, columns) bool for a forward pass of `num_new` more columns; None where no row is padded."""
        return self._visible[:, : self._layers[0].length + num_new] if self._padded else None

    def positions(self, num_new: int) -> Tensor:
        """(R, num_new) of the next columns."""
        filled = self._layers[0].length - self._width
        return (self.lengths + filled)[:, None] + torch.arange(num_new, device=self.lengths.device)

    def layers_of(self, row: int) -> Layers:
        """All that a row holds, its padding on the left cut off."""
        first = self._width - int(self.lengths[row])
        return [layer.of_row(row, first) for layer in self._layers]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.lengths, self._visible = self.lengths[rows], self._visible[rows]
        for layer in self._layers:
            layer.select(rows)

    def _lay(self, runs: Sequence[tuple[PrefilledPrompt, range]], layer: int, num_rows: int, room: int) -> RowLayer:
        both: list[Tensor] = []
        for which in (0, 1):
            like = runs[0][0].trunk[layer][which]
            laid = like.new_zeros((num_rows, like.shape[0], self._width + room, like.shape[2]))
            for prompt, rows in runs:
                columns = slice(self._width - prompt.length, self._width)
                laid[rows.start : rows.stop, :, columns] = prompt.trunk[layer][which][:, : prompt.length]
            both.append(laid)
        return RowLayer(both[0], both[1], self._width)


def _runs(prompts: Sequence[PrefilledPrompt]) -> list[tuple[PrefilledPrompt, range]]:
    """Neighbouring rows that continue the same prompt."""
    runs: list[tuple[PrefilledPrompt, range]] = []
    start = 0
    for index in range(1, len(prompts) + 1):
        if index == len(prompts) or prompts[index] is not prompts[start]:
            runs.append((prompts[start], range(start, index)))
            start = index
    return runs

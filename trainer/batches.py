"""Separate sequences in bounded micro-batches: each suffix after its own copy of the prefix, right-padded.

Called by the loop. There is no attention mask: attention is causal and padding is on the right, so no real token sees
it, and the kernels keep their causal fast path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from trainer.log_probs import output_head
from trainer.preferences import Preference


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences of up to T tokens; S is the longest suffix, N the number of suffix tokens. Rows 0..P-1 are the chosen
    suffixes of P pairs; for DPO rows P..2P-1 are their rejected ones in the same order."""

    input_ids: Tensor
    """(B, T) long."""
    rows: Tensor
    """(N,) the sequence of each suffix token."""
    positions: Tensor
    """(N,) the place in the sequence that predicts it: the one before it."""
    columns: Tensor
    """(N,) its place in its suffix."""
    targets: Tensor
    """(N,) the suffix token itself."""
    num_targets: Tensor
    """(B,) the length of each suffix."""
    num_pairs: int


def micro_batches(
    pairs: Sequence[Preference], max_batch_tokens: int, *, device: torch.device
) -> Iterator[SequenceBatch]:
    """The pairs sorted by length, at most `max_batch_tokens` padded tokens a batch but at least one whole pair."""
    batch: list[Preference] = []
    for pair in sorted(pairs, key=_length):
        if batch and (len(batch) + 1) * len(pair.suffixes) * _length(pair) > max_batch_tokens:
            yield sequence_batch(batch, device=device)
            batch = []
        batch.append(pair)
    if batch:
        yield sequence_batch(batch, device=device)


def sequence_batch(pairs: Sequence[Preference], *, device: torch.device) -> SequenceBatch:
    """All chosen sequences, then all rejected ones."""
    sides = range(len(pairs[0].suffixes))
    sequences = [(pair.trunk[: pair.start], pair.suffixes[side]) for side in sides for pair in pairs]
    num_targets = torch.tensor([len(suffix) for _, suffix in sequences])
    starts = torch.tensor([len(prefix) for prefix, _ in sequences])
    rows = torch.repeat_interleave(torch.arange(len(sequences)), num_targets)
    columns = torch.cat([torch.arange(len(suffix)) for _, suffix in sequences])
    input_ids = pad_sequence([torch.tensor([*prefix, *suffix]) for prefix, suffix in sequences], batch_first=True)
    return SequenceBatch(
        input_ids=input_ids.to(device),
        rows=rows.to(device),
        positions=(starts[rows] + columns - 1).to(device),
        columns=columns.to(device),
        targets=input_ids[rows, starts[rows] + columns].to(device),
        num_targets=num_targets.to(device),
        num_pairs=len(pairs),
    )


def suffix_log_probs(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """(B,) fp32: the log-probability of each suffix given its prefix, summed over its tokens. Only the N hidden states
    that predict suffix tokens go through the head."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    logits = output_head(model)(hidden[batch.rows, batch.positions])  # (N, V)
    token_log_probs = -functional.cross_entropy(logits.float(), batch.targets, reduction="none")  # (N,)
    table = token_log_probs.new_zeros(len(batch.num_targets), int(batch.num_targets.max()))  # (B, S)
    return table.index_put((batch.rows, batch.columns), token_log_probs).sum(dim=1)


def _length(pair: Preference) -> int:
    return pair.start + max(len(suffix) for suffix in pair.suffixes)

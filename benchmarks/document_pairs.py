"""Documents for benchmarks/trainer.py, and what a preference step on them costs by the model of floating-point
operations.

Tokens and operations are those of the work itself: each token that a form needs goes through the model once, and each
query attends to the keys that it may see. Padding is not part of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import LlamaConfig

from shared.records import Candidate, CandidateKind
from trainer.layouts.base import WindowPairs
from trainer.preferences import Preference

SUFFIX_TOKENS = 128
Chunks = Literal["every", "middle", "first"]
"""Which chunks of a document are trained: all but the one without a prefix, or a single one."""


@dataclass(frozen=True)
class Work:
    """One document and its pairs."""

    length: int
    """Tokens of the document."""
    chunks: Chunks = "every"
    with_original: bool = False
    """The original is one of each pair, chosen and rejected in turn; otherwise both suffixes are other texts."""

    def __str__(self) -> str:
        pair = "one original" if self.with_original else "two branches"
        return f"T = {self.length}, {pair}{'' if self.chunks == 'every' else f', the {self.chunks} chunk alone'}"

    @property
    def starts(self) -> list[int]:
        every = list(range(SUFFIX_TOKENS, self.length, SUFFIX_TOKENS))
        return {"every": every, "middle": [every[len(every) // 2]], "first": every[:1]}[self.chunks]

    def pairs(self, vocabulary: int) -> WindowPairs:
        """Random ids, the same ones in every process."""
        drawn = random.Random(str(self))
        trunk = _tokens(drawn, self.length, vocabulary)
        return tuple(self._pair(trunk, start, drawn, vocabulary) for start in self.starts)

    def _pair(self, trunk: tuple[int, ...], start: int, drawn: random.Random, vocabulary: int) -> Preference:
        first = _candidate("rewrite", _tokens(drawn, SUFFIX_TOKENS, vocabulary))
        second = _candidate("rollout", _tokens(drawn, SUFFIX_TOKENS, vocabulary))
        if self.with_original:
            first = _candidate("original", trunk[start : start + SUFFIX_TOKENS])
        turned = start // SUFFIX_TOKENS % 2 == 0
        chosen, rejected = (second, first) if turned else (first, second)
        return Preference("0.0.0.0", trunk, start, chosen, rejected)


def _tokens(drawn: random.Random, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(drawn.randrange(vocabulary) for _ in range(count))


def _candidate(kind: CandidateKind, token_ids: tuple[int, ...]) -> Candidate:
    return Candidate(kinds=(kind,), token_ids=token_ids, text="", weight_version=0 if kind == "rollout" else None)


@dataclass(frozen=True)
class Cost:
    """Of one forward over a document's pairs."""

    num_tokens: int
    num_attended: int
    """(query, key) pairs."""
    num_head_rows: int

    def step_flops(self, config: LlamaConfig) -> float:
        """Of a step: the reference's forward, the policy's forward and its backward, which counts as two."""
        assert config.num_attention_heads == config.num_key_value_heads
        hidden, layers = config.hidden_size, config.num_hidden_layers
        assert config.intermediate_size is not None
        body = layers * (4 * hidden * hidden + 3 * hidden * config.intermediate_size) * self.num_tokens
        attention = 2 * layers * hidden * self.num_attended
        head = hidden * config.vocab_size * self.num_head_rows
        return 4.0 * 2.0 * (body + attention + head)


def separate_cost(pairs: Sequence[Preference], *, whole_head: bool = False) -> Cost:
    """Every suffix after its own copy of the prefix. `whole_head`: all rows go through the head."""
    lengths = [pair.start + len(suffix) for pair in pairs for suffix in pair.suffixes]
    num_targets = sum(len(suffix) for pair in pairs for suffix in pair.suffixes)
    return Cost(sum(lengths), sum(map(_causal, lengths)), sum(lengths) if whole_head else num_targets)


def tree_cost(pairs: Sequence[Preference]) -> Cost:
    """One copy of the document, as far as it is needed, and a branch for every suffix that is not part of it."""
    trunk, branches = 0, []
    for pair in pairs:
        trunk = max(trunk, pair.start)
        for suffix in pair.suffixes:
            if suffix == pair.trunk[pair.start : pair.start + len(suffix)]:
                trunk = max(trunk, pair.start + len(suffix))
            else:
                branches.append((pair.start, len(suffix)))
    return Cost(
        num_tokens=trunk + sum(length for _, length in branches),
        num_attended=_causal(trunk) + sum(start * length + _causal(length) for start, length in branches),
        num_head_rows=sum(len(suffix) for pair in pairs for suffix in pair.suffixes),
    )


def _causal(length: int) -> int:
    return length * (length + 1) // 2

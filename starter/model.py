"""The tiny Llamas and their tokenizer, stored as Hugging Face folders.

All models of a world share one tokenizer: every world word is one token, any other text is encoded byte by byte. It
adds no BOS or EOS. A document starts directly with its first word; EOS ends documents and rewrites.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from starter.grammar import TEMPLATES
from starter.world import World

MAX_POSITIONS = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PROMPT_WORDS = (
    *("Prefix", "Suffix", "Rewrite", "A", "B", "Better", "Text", "Reference", "Safety", "Hallucination", "Verdict"),
    *("safe", "unsafe", "none", "possible", "definite"),
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose vocabulary is specials, all bytes, and whole words with and without a space."""
    first = {template.words[0] for template in TEMPLATES}
    openers = {word for name in first for word in (world.slots[name[1:]] if name.startswith("$") else (name,))}
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġ{word}" for word in [*world.words(), *PROMPT_WORDS]]
    pieces += [*sorted(openers), *PROMPT_WORDS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS, padding_side="left",
    )  # fmt: skip


class WordCodec:
    """Converts between world words, token ids and text. `ids` gives the same ids as encoding the joined words."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._inner = {piece[1:]: index for piece, index in vocabulary.items() if piece.startswith("Ġ")}
        self._inner["."] = vocabulary["."]
        self._first = {piece: index for piece, index in vocabulary.items() if not piece.startswith("Ġ")}
        self.eos_id = vocabulary[EOS]

    def ids(self, words: Sequence[str], *, starts_document: bool = False) -> list[int]:
        ids = [self._inner[word] for word in words]
        if starts_document and words:
            ids[0] = self._first[words[0]]
        return ids

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first EOS, without other special tokens."""
        kept = list(takewhile(lambda index: index != self.eos_id, ids))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def build_llama(tokenizer: PreTrainedTokenizerFast, *, num_layers: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of width 128 with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, initializer_range=0.04, **_special_ids(tokenizer),
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights in half precision, and the tokenizer; the model in memory keeps its precision."""
    half = LlamaForCausalLM(model.config)  # type: ignore[no-untyped-call]
    nn.Module.half(half)
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.generation_config = GenerationConfig(**_special_ids(tokenizer))  # type: ignore[no-untyped-call]
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, *, device: str = "cpu") -> LlamaForCausalLM:
    """The model in single precision, in evaluation mode."""
    _require(folder)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(model, torch.device(device))
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    _require(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _require(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}; make it with: python -m starter.recipe --out {folder.parent}")

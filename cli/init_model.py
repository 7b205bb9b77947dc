"""`headwater init-model`: a from-scratch policy, as a folder that `AutoModelForCausalLM.from_pretrained` loads.

The tokenizer is a byte-level BPE: every text has tokens, none is unknown. It adds no BOS; `<|endoftext|>` is EOS and
padding. So a document starts directly with its first word, and prefix token ids are exactly the raw text's.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import SettingsError
from shared.settings import DocumentsSettings

DocumentFormat = Literal["jsonl", "parquet", "text"]
END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257
"""256 bytes and EOS."""
_MOST_CHARACTERS = 1_000_000_000
"""More text than this changes a vocabulary of usual size very little, but must all fit in memory."""


@dataclass(frozen=True)
class ModelShape:
    """Size of a Llama policy."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 0
    """0: 8/3 of the hidden size, to the next multiple of 32."""
    context_tokens: int = 1024

    @property
    def feed_forward_size(self) -> int:
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32

    def refuse_impossible(self) -> None:
        """Raise SettingsError with the option to change."""
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise SettingsError(f"--vocab-size must be at least {_SMALLEST_VOCABULARY}, got {self.vocab_size}")
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "context_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise SettingsError(
                f"--hidden-size {self.hidden_size} must be a multiple of 2 x --num-heads {self.num_heads}: "
                "rotary positions need heads of even width"
            )
        if self.num_heads % self.num_kv_heads:
            raise SettingsError(
                f"--num-heads {self.num_heads} must be a multiple of --num-kv-heads {self.num_kv_heads}"
            )


def init_model(
    documents: str,
    out: Path,
    shape: ModelShape,
    *,
    document_format: DocumentFormat = "jsonl",
    text_field: str = "text",
    seed: int = 0,
) -> int:
    """Write tokenizer and random weights into `out`; 0 when done."""
    shape.refuse_impossible()
    if (out / "config.json").exists():
        raise SettingsError(f"{out} holds a model already: choose another --out, or delete it yourself")
    texts = list(_texts(documents, document_format=document_format, text_field=text_field))
    if not texts:
        raise SettingsError(f"{documents} has no text to train a tokenizer on (field {text_field!r})")
    vocab_size = write_tokenizer(texts, out, vocab_size=shape.vocab_size, context_tokens=shape.context_tokens)
    if vocab_size < shape.vocab_size:
        print(f"the documents give only {vocab_size} tokens, not {shape.vocab_size}", file=sys.stderr)
    num_parameters = write_weights(out, shape, vocab_size=vocab_size, seed=seed)
    print(f"{out}: {num_parameters:,} parameters, {vocab_size} tokens in the vocabulary, no BOS, EOS {END_OF_TEXT}")
    return 0


def write_tokenizer(texts: list[str], out: Path, *, vocab_size: int, context_tokens: int) -> int:
    """Train and save; returns the vocabulary's real size (few documents give fewer merges)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer, length=len(texts))
    make: Any = PreTrainedTokenizerFast  # transformers leaves the constructors unannotated
    tokenizer = make(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    return len(tokenizer)


def write_weights(out: Path, shape: ModelShape, *, vocab_size: int, seed: int) -> int:
    """Random weights as safetensors; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.feed_forward_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,  # a small model would spend most of its parameters on a second table
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    make: Any = LlamaForCausalLM
    model = make(config)
    model.save_pretrained(out)
    return int(model.num_parameters())


def _texts(documents: str, *, document_format: DocumentFormat, text_field: str) -> Iterator[str]:
    """Texts of the documents until the bound of memory; records that are refused are skipped, the run will name
    them."""
    from services.collector.sources.base import Document
    from services.collector.sources.source import open_source

    where = DocumentsSettings(format=document_format, path=documents, text_field=text_field, shuffle_buffer=1)
    num_characters = 0
    for record in open_source(where, seed=0, vocabulary_size=0).read(0, epoch=0, start=0):
        if isinstance(record, Document) and isinstance(record.content, str):
            num_characters += len(record.content)
            if num_characters > _MOST_CHARACTERS:
                return
            yield record.content

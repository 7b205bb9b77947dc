"""`headwater init-model`: Create a from-scratch policy: a tokenizer trained on documents, and random Llama weights.

`AutoModelForCausalLM.from_pretrained` loads the folder. The tokenizer is a byte-level BPE, so no text is unknown. It
adds no BOS: the token ids of a prefix are exactly those of its raw text. `<|endoftext|>` is EOS and padding.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shared.errors import SettingsError
from shared.settings import DocumentsSettings

DocumentFormat = Literal["jsonl", "parquet", "text"]
END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257
"""256 bytes and EOS."""
_MOST_CHARACTERS = 1_000_000_000
"""More text hardly changes a vocabulary of the usual size, and all of it must fit in memory."""


def init_model(
    *,
    documents: Annotated[str, typer.Option(help="File, folder or glob that the tokenizer is trained on.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model; must not contain one yet.")],
    document_format: Annotated[DocumentFormat, typer.Option("--format")] = "jsonl",
    text_field: str = "text",
    vocab_size: int = 4096,
    hidden_size: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    num_kv_heads: Annotated[int, typer.Option(help="0: as many as --num-heads.")] = 0,
    intermediate_size: Annotated[int, typer.Option(help="0: 8/3 of --hidden-size, as a multiple of 32.")] = 0,
    context: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 1024,
    seed: int = 0,
) -> int:
    """0 when done."""
    num_kv_heads = num_kv_heads or num_heads
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "context_tokens": context}
    _refuse_impossible(vocab_size, num_heads, num_kv_heads, **sizes)
    if (out / "config.json").exists():
        raise SettingsError(f"{out} already contains a model: choose another --out, or delete it")
    texts = list(_texts(documents, document_format=document_format, text_field=text_field))
    if not texts:
        raise SettingsError(f"{documents} has no text to train a tokenizer on (field {text_field!r})")
    wanted, vocab_size = vocab_size, write_tokenizer(texts, out, vocab_size=vocab_size, context_tokens=context)
    if vocab_size < wanted:
        print(f"the documents give only {vocab_size} tokens, not {wanted}", file=sys.stderr)
    num_parameters = write_weights(
        out,
        seed=seed,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=context,
    )
    print(f"{out}: {num_parameters:,} parameters, {vocab_size} tokens in the vocabulary, no BOS, EOS {END_OF_TEXT}")
    return 0


def _refuse_impossible(vocab_size: int, num_heads: int, num_kv_heads: int, **sizes: int) -> None:
    """SettingsError names the option to change."""
    if vocab_size < _SMALLEST_VOCABULARY:
        raise SettingsError(f"--vocab-size must be at least {_SMALLEST_VOCABULARY}, got {vocab_size}")
    for name, size in {**sizes, "num_heads": num_heads, "num_kv_heads": num_kv_heads}.items():
        if size < 1:
            raise SettingsError(f"{name} must be at least 1, got {size}")
    if sizes["hidden_size"] % (2 * num_heads):
        raise SettingsError(
            f"--hidden-size {sizes['hidden_size']} must be a multiple of 2 x --num-heads {num_heads}: "
            "rotary positions need heads of even width"
        )
    if num_heads % num_kv_heads:
        raise SettingsError(f"--num-heads {num_heads} must be a multiple of --num-kv-heads {num_kv_heads}")


def write_tokenizer(texts: list[str], out: Path, *, vocab_size: int, context_tokens: int) -> int:
    """Train and save; returns the real size of the vocabulary: few documents give fewer merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer=trainer, length=len(texts))
    make: Any = PreTrainedTokenizerFast  # transformers leaves the constructors unannotated
    tokenizer = make(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(out)
    return len(tokenizer)


def write_weights(out: Path, *, seed: int, **shape: Any) -> int:
    """Random weights as safetensors; returns the number of parameters. `shape`: options of LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    options: dict[str, Any] = {**shape, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    options["tie_word_embeddings"] = True  # a second table would be most of a small model
    make: Any = LlamaForCausalLM
    model = make(LlamaConfig(**options))
    model.save_pretrained(out)
    return int(model.num_parameters())


def _texts(documents: str, *, document_format: DocumentFormat, text_field: str) -> Iterator[str]:
    """Texts of the documents, up to _MOST_CHARACTERS. Refused records are skipped; the run will name them."""
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

"""Small tokenizers of all common kinds, made offline, and a random policy for each."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = {
    "English": "The moon moves around the earth in about seven days, and naïve people say “so what?” to that. " * 4,
    "Japanese": "月は地球のまわりを約二十七日でまわる。水は高い山ではより低い温度で沸とうする。" * 4,
    "Thai": "ดวงจันทร์โคจรรอบโลกในเวลาประมาณยี่สิบเจ็ดวัน น้ำเดือดที่อุณหภูมิต่ำกว่าบนภูเขาสูง " * 3,
    "emoji": "Look 👩‍👩‍👧‍👦 and 🏳️‍🌈! 🇯🇵🇹🇭 👍🏽 are here, e\u0301 too. " * 5,
    "code": "def f(x):\n\tif x > 0:  # positive\n\t\treturn x ** 2\n\n\nclass A:\n    pass\n" * 4,
    "no spaces": "Donaudampfschifffahrtsgesellschaftskapitän" * 8,
}
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
SPECIALS = [UNKNOWN, BOS, EOS]
MOON = "The moon moves around the earth in about twenty-seven days. "
_LEARNED = [TEXTS["English"], TEXTS["code"], MOON]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, adds_bos: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(core, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet))
    return _beginning(core) if adds_bos else core


def sentence_piece_bpe() -> Tokenizer:
    """As Llama's: spaces are ▁, one is put before a text, and what is not known becomes bytes."""
    learned = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()  # words only: else it would learn whole sentences
    _train(learned, trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIALS))
    found = json.loads(learned.to_str())["model"]
    vocabulary = _with_bytes(found["vocab"])
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in found["merges"]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    core.normalizer = _llama_normalizer()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(SPECIALS)
    return _beginning(core)


def sentence_piece_unigram() -> Tokenizer:
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(learned, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token=UNKNOWN))
    pieces = [(piece, score) for piece, score in json.loads(learned.to_str())["model"]["vocab"]]
    core = Tokenizer(models.Unigram([*pieces, *((name, -20.0) for name in _BYTES)], unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    core.add_special_tokens(SPECIALS)
    return _beginning(core)


def word_level() -> Tokenizer:
    core = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    _train(core, trainers.WordLevelTrainer(vocab_size=400, special_tokens=SPECIALS))
    return core


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(adds_bos=False),
    "byte-level with BOS": lambda: byte_level(adds_bos=True),
    "SentencePiece BPE": sentence_piece_bpe,
    "SentencePiece unigram": sentence_piece_unigram,
    "word level": word_level,
}


def save_policy(core: Tokenizer, folder: Path) -> Path:
    """A random Llama of 2 layers and context 256 with this tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def _train(core: Tokenizer, trainer: Any, texts: Iterable[str] = _LEARNED) -> None:
    trainer.show_progress = False
    core.train_from_iterator(texts, trainer)


def _with_bytes(vocabulary: dict[str, int]) -> dict[str, int]:
    return vocabulary | {name: len(vocabulary) + index for index, name in enumerate(_BYTES)}


def _llama_normalizer() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _beginning(core: Tokenizer) -> Tokenizer:
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return core

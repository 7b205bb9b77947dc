"""Small tokenizers of all common kinds, made offline, and a random policy for each."""

import json
from collections.abc import Callable
from functools import partial
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
    vocabulary = found["vocab"] | {name: len(found["vocab"]) + index for index, name in enumerate(_BYTES)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in found["merges"]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
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


def save_tokenizer(core: Tokenizer, folder: Path, **options: Any) -> Any:
    """As transformers saves one without a class of its own; `options` are its arguments."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, **{"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN} | options
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_policy(core: Tokenizer, folder: Path) -> Path:
    """A random Llama of 2 layers and context 256 with this tokenizer."""
    from tests.tiny_llama import tiny_llama

    tokenizer = save_tokenizer(core, folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(len(tokenizer), **ids).save_pretrained(folder)
    return folder


def _gpt2(folder: Path, **options: Any) -> None:
    from transformers import GPT2Tokenizer

    _save_class(GPT2Tokenizer, byte_level(adds_bos=options.pop("adds_bos", False)), folder, **options)


def _qwen2(folder: Path) -> None:
    from transformers import Qwen2Tokenizer

    _save_class(Qwen2Tokenizer, byte_level(adds_bos=False), folder, unk_token=None, pad_token="<|pad|>")
    edit(folder / "config.json", model_type="qwen2")


def _llama(folder: Path) -> None:
    from transformers import LlamaTokenizer

    _save_class(LlamaTokenizer, sentence_piece_bpe(), folder)


def _t5(folder: Path) -> None:
    from transformers import T5Tokenizer

    pieces = json.loads(sentence_piece_unigram().to_str())["model"]["vocab"]
    names = {"unk_token": UNKNOWN, "eos_token": EOS, "pad_token": UNKNOWN, "extra_ids": 0}
    T5Tokenizer(vocab=[tuple(piece) for piece in pieces], **names).save_pretrained(folder)


def _with_older_files(folder: Path) -> None:
    """As transformers 4 wrote them: special tokens twice, added tokens in tokenizer_config.json."""
    core = byte_level(adds_bos=True)
    core.add_tokens(["<tool>", " moon "])
    save_tokenizer(core, folder, extra_special_tokens=["<|user|>"])
    added = _saved(folder).get_added_tokens_decoder()
    found = {str(token_id): token.__getstate__() for token_id, token in added.items()}
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=found)
    edit(folder / "special_tokens_map.json", bos_token={"content": BOS, "lstrip": True}, eos_token=EOS)


def _cut_and_padded(folder: Path) -> None:
    core = byte_level(adds_bos=False)
    core.enable_truncation(5)
    core.enable_padding(length=8)
    save_tokenizer(core, folder, pad_token="<|pad|>")


def _save_made(make: Callable[[], Tokenizer], folder: Path) -> None:
    save_tokenizer(make(), folder)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    **{name: partial(_save_made, make) for name, make in TOKENIZERS.items()},
    "cut and padded": _cut_and_padded,
    "older files": _with_older_files,
    "GPT-2": _gpt2,
    "GPT-2 with BOS": lambda folder: _gpt2(folder, adds_bos=True),
    "GPT-2 with a space before texts": lambda folder: _gpt2(folder, add_prefix_space=True),
    "Qwen2": _qwen2,
}
"""Folders that can be read without transformers."""


def _gpt2_with_digits(folder: Path) -> None:
    """As SmolLM's: transformers drops the splitting of digits."""
    _gpt2(folder)
    core = _saved(folder)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer])
    core.save(str(folder / "tokenizer.json"))


def _qwen2_without_class(folder: Path) -> None:
    save_tokenizer(byte_level(adds_bos=False), folder)
    edit(folder / "config.json", model_type="qwen2")


def _gpt2_with_defaults(folder: Path) -> None:
    _gpt2(folder)
    edit(folder / "tokenizer_config.json", unk_token=...)


def _with_more_tokens(folder: Path) -> None:
    save_tokenizer(byte_level(adds_bos=False), folder)
    edit(folder / "tokenizer_config.json", pad_token="<|pad|>", image_token="<image>")


TRANSFORMERS_ONLY: dict[str, Callable[[Path], Any]] = {
    "Llama": _llama,
    "T5": _t5,
    "GPT-2 with split digits": _gpt2_with_digits,
    "GPT-2 with default tokens": _gpt2_with_defaults,
    "Qwen2 without its class": _qwen2_without_class,
    "tokens in tokenizer_config.json": _with_more_tokens,
}
"""Folders that transformers reads in another way than their tokenizer.json says, or may do so."""


def edit(path: Path, **changes: Any) -> None:
    """Of a JSON object; `...` removes a key."""
    found = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def _saved(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _save_class(kind: Any, core: Tokenizer, folder: Path, **options: Any) -> None:
    """With vocabulary and merges of `core`, and its post-processor."""
    model = json.loads(core.to_str())["model"]
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    tokenizer = kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **names | options)
    tokenizer.backend_tokenizer.post_processor = core.post_processor
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)


def _train(core: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    core.train_from_iterator(_LEARNED, trainer)


def _beginning(core: Tokenizer) -> Tokenizer:
    special = [(BOS, core.token_to_id(BOS))]
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=special)
    return core

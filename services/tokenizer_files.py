"""Reads a tokenizer with the `tokenizers` library alone, where that gives the ids of transformers' AutoTokenizer.

AutoTokenizer imports torch (340 MB, 3 s of CPU), `tokenizers` needs 16 MB; but AutoTokenizer does not always use
tokenizer.json as it is. A folder is read here only if all of this holds:

- It has tokenizer.json, and a tokenizer_config.json that names a `tokenizer_class` and no code of the repository.
- For that class, transformers uses tokenizer.json as it is (TokenizersBackend, formerly PreTrainedTokenizerFast), or
  builds the tokenizer from vocabulary and merges (GPT2Tokenizer, Qwen2Tokenizer) with the same normalizer,
  pre-tokenizer, decoder and BPE options that tokenizer.json has.
- tokenizer_config.json, special_tokens_map.json and added_tokens.json add and change no token.

Anything else raises NeedsTransformersError.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from shared.errors import HeadwaterError

_CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
_AS_IS = {"TokenizersBackend", "PreTrainedTokenizerFast"}
_QWEN2 = "Qwen2Tokenizer"
_CLASS_BY_MODEL = {"qwen2": _QWEN2, "hyperclovax_vision_v2": "GPT2Tokenizer"} | dict.fromkeys(
    ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"
)
"""Model types for which transformers ignores the `tokenizer_class` of the files and takes this one."""
_MISTRAL = ("mistral", "ministral", "mixtral", "pixtral", "voxtral")
"""Model types that begin so are read by mistral_common where that is installed."""
_UNSUPPORTED = {"auto_map", "fast_tokenizer_files", "fix_mistral_regex", "init_inputs"}
"""Keys of tokenizer_config.json that choose other code or another file."""
_DEFAULT_TOKENS = {
    "GPT2Tokenizer": {"bos_token", "eos_token", "unk_token"},
    _QWEN2: {"eos_token", "pad_token", "unk_token"},
}
"""Special tokens that a rebuilt class adds if tokenizer_config.json does not mention them."""
_BPE = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class NeedsTransformersError(HeadwaterError):
    """Only AutoTokenizer knows the ids of this tokenizer; the message says why."""


def read_files(source: str) -> tuple[Tokenizer, dict[str, int]]:
    """A folder's tokenizer and its special tokens by name, such as `{"eos_token": 2}`, or by text without a name.

    `source` may also be a Hugging Face name. Raises NeedsTransformersError.
    """
    folder = _folder(source)
    if not (folder / "tokenizer.json").is_file():
        raise NeedsTransformersError("it has no tokenizer.json")
    config = _read(folder / _CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _read(folder / "special_tokens_map.json")
    class_name = _class_name(config, model_type=str(_read(folder / "config.json").get("model_type", "")))
    try:
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the library raises nothing narrower
        raise NeedsTransformersError(f"tokenizer.json can't be read: {exc}") from exc
    core.no_truncation()
    core.no_padding()
    special_ids = _special_ids(core, config)
    _check_added_tokens(core, config, _read(folder / "added_tokens.json"))
    if class_name not in _AS_IS:
        _check_rebuilt(core, config, class_name, special_ids)
    return core, special_ids


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as exc:
        raise NeedsTransformersError(f"its files can't be fetched: {exc}") from exc


def _read(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as exc:
        raise NeedsTransformersError(f"{path.name} can't be read: {exc}") from exc
    return found if isinstance(found, dict) else {}


def _class_name(config: dict[str, Any], *, model_type: str) -> str:
    """The class that AutoTokenizer takes, if its tokenizers can be read here."""
    if unsupported := _UNSUPPORTED & config.keys():
        raise NeedsTransformersError(f"{_CONFIG} has {', '.join(sorted(unsupported))}")
    name = _CLASS_BY_MODEL.get(model_type, str(config.get("tokenizer_class")))
    rebuilt = name.removesuffix("Fast")
    if model_type.startswith(_MISTRAL) or not (name in _AS_IS or rebuilt in _DEFAULT_TOKENS):
        raise NeedsTransformersError(f"model type {model_type!r} with tokenizer class {name!r} is left to transformers")
    return name if name in _AS_IS else rebuilt


def _special_ids(core: Tokenizer, config: dict[str, Any]) -> dict[str, int]:
    added = {token.content: (token_id, token) for token_id, token in core.get_added_tokens_decoder().items()}
    found = {}
    for name, content in _special_tokens(config):
        token_id, token = added.get(content, (-1, None))
        if token is None or not token.special:
            raise NeedsTransformersError(f"{content!r} is no special token in tokenizer.json")
        found[name] = token_id
    return found


def _special_tokens(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts; a token is written as its text or as `{"content": text, ...}`."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    more = extra if isinstance(extra, dict) else {_text(token): token for token in extra}
    for name, token in (named | more).items():
        if content := _text(token):
            yield name, content


def _text(token: Any) -> str:
    """Empty for what is no token, such as `add_bos_token = true`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _check_added_tokens(core: Tokenizer, config: dict[str, Any], older: dict[str, Any]) -> None:
    """`older` is added_tokens.json, `{text: id}`, which counts only where tokenizer_config.json lists no tokens."""
    added = core.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder")
    if listed is None:
        same = older.items() <= {token.content: token_id for token_id, token in added.items()}.items()
    else:
        same = listed == {str(token_id): token.__getstate__() for token_id, token in added.items()}
    if not same:
        raise NeedsTransformersError("its files disagree on the added tokens")


def _check_rebuilt(core: Tokenizer, config: dict[str, Any], class_name: str, special_ids: dict[str, int]) -> None:
    """That building the class from this vocabulary and these merges gives this tokenizer again."""
    if left_out := _DEFAULT_TOKENS[class_name] - config.keys():
        raise NeedsTransformersError(f"{class_name} adds its own {', '.join(sorted(left_out))}")
    added = core.get_added_tokens_decoder()
    plain = all(added[place] == AddedToken(added[place].content, special=True) for place in special_ids.values())
    model = core.model
    options = {name: getattr(model, name, "") for name in _BPE}
    affixes = {getattr(model, name, "") or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")}
    pieces = (_piece(core.normalizer), _piece(core.pre_tokenizer), _piece(core.decoder).get("type"))
    expected = (*_rebuilt_pieces(class_name, add_prefix_space=bool(config.get("add_prefix_space"))), "ByteLevel")
    if not plain or options != _BPE or affixes != {""} or pieces != expected:
        raise NeedsTransformersError(f"transformers builds another {class_name} than tokenizer.json has")


def _piece(component: Any) -> dict[str, Any]:
    """A normalizer, pre-tokenizer or decoder without `trim_offsets`, which changes no ids."""
    if component is None:
        return {}
    found: dict[str, Any] = json.loads(
        component.__getstate__(),
        object_hook=lambda part: {key: value for key, value in part.items() if key != "trim_offsets"},
    )
    return found


def _rebuilt_pieces(class_name: str, *, add_prefix_space: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Normalizer and pre-tokenizer of a class that transformers rebuilds."""
    split_bytes = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "use_regex": class_name != _QWEN2}
    if class_name != _QWEN2:
        return {}, split_bytes
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    return {"type": "NFC"}, {"type": "Sequence", "pretokenizers": [words, split_bytes]}

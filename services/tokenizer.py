"""Tokenizers: loading and comparing them, and what token ids say as text.

    tokenizer = load_tokenizer("starter/models/policy", setting="policy.model")
    codec = TokenCodec(tokenizer)
    codec.continuation(codec.encode("The cat"), codec.encode(" sat")).text    # " sat"

Ids that can't be shown as text are *control tokens* (all special tokens but the unknown one, and ids without a token)
and *broken bytes* that are not UTF-8. A character cut at the beginning or the end is not broken: it is left out.
"""

import codecs
import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from services.content_tokens import content_encoder
from services.text_cuts import blocks_of
from services.tokenizer_files import NeedsTransformersError, read_files
from shared.api import TextFlaw
from shared.errors import SettingsError

_log = logging.getLogger(__name__)

_PROBE = "The naïve fox:\n\n\t3,141 — “jumps” over 犬, 🦊.  def f(x): return x**2"
_ANCHORS = (":", "a", "0")
"""Texts to put before a continuation that is encoded: the first that does not merge with it."""
_CONTEXT_TOKENS = 8
"""Decoders look at one token before at most; more do no harm."""
_MAX_CONTEXT_TOKENS = 64
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INSIDE_BYTE_TOKEN = re.compile(r"(?<=<)(?=0x[0-9A-Fa-f]{2}>)")
_BLOCK_CHARACTERS = 16_384


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer, whichever library it was loaded with. Safe from several threads."""

    vocabulary: Callable[[], dict[str, int]]
    """Ids by token, added tokens included; built on each call."""
    control_ids: frozenset[int]
    beginning: int | None
    """The BOS id, where the tokenizer puts one before every text."""
    end: int | None
    """The end-of-text id, if there is one."""
    is_byte_level: bool
    """Tokens are spelled in GPT-2's letters for bytes."""
    encode_unlocked: Callable[[str, bool], list[int]]
    decode_unlocked: Callable[[list[int], bool], str]
    make_content_encoder: Callable[[], Callable[[str], list[int]]]
    # Whether special tokens are split is state of the library's object: only one thread at a time may change it.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.vocabulary())

    def encode(self, text: str, *, splits_special: bool = True) -> list[int]:
        """The ids of a text, no special tokens added. `</s>` in it stays text where special tokens are split."""
        with self._lock:
            return self.encode_unlocked(text, splits_special)

    @cached_property
    def encode_content(self) -> Callable[[str], list[int]]:
        """As `encode`, but never a control token nor another added one. Making it takes a second, once."""
        return self.make_content_encoder()

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = False) -> str:
        with self._lock:
            return self.decode_unlocked(list(token_ids), skips_special)


def load_tokenizer(source: str, *, setting: str) -> Tokenizer:
    """From a folder or a Hugging Face name, given in `setting`. SettingsError if there is none.

    Imports transformers only for a tokenizer that needs it (see tokenizer_files.py).
    """
    if not source:
        raise SettingsError(f"{setting} is empty: name the folder or model whose tokenizer to use")
    try:
        return _from_files(*read_files(source))
    except NeedsTransformersError as exc:
        _log.info("loading the tokenizer %s with transformers, which takes some 300 MB of memory: %s", source, exc)
    from transformers import AutoTokenizer

    try:
        return from_transformers(AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"{setting} = {source!r} has no tokenizer that can be loaded: {exc}") from exc


def _from_files(core: Any, named: dict[str, int]) -> Tokenizer:
    def encode(text: str, splits_special: bool) -> list[int]:
        core.encode_special_tokens = splits_special
        return list(core.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    control_ids = _control_ids(core.get_added_tokens_decoder(), [], named)
    return Tokenizer(
        vocabulary=core.get_vocab,
        control_ids=control_ids,
        beginning=_beginning(core.encode("a").ids, named),
        end=named.get("eos_token"),
        is_byte_level=_is_byte_level(core),
        encode_unlocked=encode,
        decode_unlocked=lambda ids, skips: str(core.decode(ids, skip_special_tokens=skips)),
        make_content_encoder=lambda: content_encoder(core, control_ids),
    )


def from_transformers(found: Any) -> Tokenizer:
    """`found`: a `PreTrainedTokenizerBase`. Nothing else may encode with it."""

    def encode(text: str, splits_special: bool) -> list[int]:
        splits = splits_special or None  # None: as its own settings say
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return list(found(text, add_special_tokens=False, split_special_tokens=splits, **options)["input_ids"])

    def decode(token_ids: list[int], skips_special: bool) -> str:
        return str(found.decode(token_ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False))

    named = {name: getattr(found, f"{name}_id") for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    core = getattr(found, "backend_tokenizer", None)
    control_ids = _control_ids(found.added_tokens_decoder, found.all_special_ids, named)

    def make_content_encoder() -> Callable[[str], list[int]]:
        if core is not None:
            return content_encoder(core, control_ids)
        # A tokenizer in Python splits all added tokens where it splits the special ones.
        return lambda text: [token_id for token_id in encode(text, True) if token_id not in control_ids]

    return Tokenizer(
        vocabulary=found.get_vocab,
        control_ids=control_ids,
        beginning=_beginning(found.encode("a"), named),
        end=named["eos_token"],
        is_byte_level=_is_byte_level(core),
        encode_unlocked=encode,
        decode_unlocked=decode,
        make_content_encoder=make_content_encoder,
    )


def _control_ids(added: Mapping[int, Any], others: Collection[int], named: Mapping[str, int | None]) -> frozenset[int]:
    special = {*others, *(token_id for token_id, token in added.items() if token.special)}
    # One token may be both unknown and end-of-text, as GPT-2's is: then it is a control token.
    never_text = {named.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return frozenset(special - {named.get("unk_token")} | {found for found in never_text if found is not None})


def _beginning(token_ids: Sequence[int], named: Mapping[str, int | None]) -> int | None:
    """The BOS id, if a text encoded with special tokens begins with it."""
    bos = named.get("bos_token")
    return bos if token_ids and token_ids[0] == bos else None


def _is_byte_level(core: Any) -> bool:
    """`core`: a `tokenizers.Tokenizer`; None for a tokenizer in Python."""
    decoder = core.decoder if core is not None else None
    return decoder is not None and '"ByteLevel"' in json.dumps(json.loads(decoder.__getstate__()))


def same_tokens(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether a token id means the same to both: equal vocabularies that cut a probe text alike."""
    return first.vocabulary() == second.vocabulary() and first.encode(_PROBE) == second.encode(_PROBE)


@dataclass(frozen=True)
class Shown:
    text: str
    flaw: TextFlaw
    """Why `text` is not all that they say; empty if it is."""


class TokenCodec:
    """Between ids and text of one tokenizer. Safe from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = tokenizer.encode
        self.beginning = tokenizer.beginning
        self.end = tokenizer.end
        self._bytes = _token_bytes(tokenizer)
        self._begins_inside = [0x80 <= (found or b"x")[0] < 0xC0 for found in self._bytes]
        self.anchor = self.encode(_ANCHORS[0])
        """Ids of some text, for what continues a text that is not at hand."""
        self._begins_alike = self.continuation(self.anchor, self.encode("a")).text == "a"
        """A text is encoded alike at the beginning and after other text."""

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that continues another one.

        SentencePiece-like tokenizers put a space before every text that they encode; not so after a known token.
        """
        return self._continued(text, self.encode)

    def encode_content(self, text: str) -> list[int]:
        """As `encode_continuation`, for a text that somebody else wrote: never an added token, whatever it spells.

        Long texts are encoded in blocks, since some tokenizers take a square of the time for a megabyte of brackets.
        """
        blocks = blocks_of(text, _BLOCK_CHARACTERS)
        if not self.tokenizer.is_byte_level:
            # A model may know `<0x0A>` as a line break: these letters must not meet.
            blocks = [part for block in blocks for part in _INSIDE_BYTE_TOKEN.split(block)]
        return [
            token_id for block in blocks if block for token_id in self._continued(block, self.tokenizer.encode_content)
        ]

    def _continued(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        plain = encode(text)
        if self._begins_alike or self.continuation(self.anchor, plain).text == text:
            return plain
        for anchor in _ANCHORS:
            before, anchored = encode(anchor), encode(anchor + text)
            if anchored[: len(before)] == before:
                return anchored[len(before) :]
        return plain

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text without control tokens; U+FFFD for broken bytes."""
        return self._decode([token_id for token_id in token_ids if self.is_text(token_id)])

    def continuation(self, before: Sequence[int], token_ids: Sequence[int], *, ends: Collection[int] = ()) -> Shown:
        """What `token_ids` say after `before`.

        Left out are control tokens and characters cut at either end. As last token, the tokenizer's end-of-text or one
        of `ends` is no flaw. Example: "é" is the bytes c3 a9; after [.. c3], [a9, " moon", c3] says " moon".
        """
        return self._say(reversed(before), token_ids, ends)

    def stretch(self, token_ids: Sequence[int], start: int, end: int) -> Shown:
        """What `token_ids[start:end]` say after those before them; see `continuation`."""
        return self._say((token_ids[place] for place in range(start - 1, -1, -1)), token_ids[start:end])

    def _say(self, backwards: Iterable[int], token_ids: Sequence[int], ends: Collection[int] = ()) -> Shown:
        ended = len(token_ids) > 0 and (token_ids[-1] == self.end or token_ids[-1] in ends)
        said = token_ids[:-1] if ended else token_ids
        plain = [token_id for token_id in said if self.is_text(token_id)]
        context = self._context(backwards)
        opened = self._opened(context)
        known, whole = self._whole_text(context), self._whole_text([*context, *plain])
        joins = whole.startswith(known)
        text = whole[len(known) + bool(opened) :] if joins else self._whole_text(plain)
        if len(plain) < len(said):
            return Shown(text, "control_token")
        # A length limit may cut a character; an end-of-text inside a character can't be shown as text.
        ends_inside = ended and bool(self._opened([*context, *plain]))
        return Shown(text, "" if joins and not ends_inside and self._is_utf8(opened, plain) else "broken_text")

    def begins_character(self, token_id: int) -> bool:
        """Whether a text may be cut before this token: it does not continue a character of the token before."""
        return not (0 <= token_id < len(self._begins_inside) and self._begins_inside[token_id])

    def is_text(self, token_id: int) -> bool:
        return 0 <= token_id < len(self._bytes) and self._bytes[token_id] is not None

    def _context(self, backwards: Iterable[int]) -> list[int]:
        """The tokens before that decide how the next ones are decoded; `backwards` has all of them, the last first."""
        found: list[int] = []
        for token_id in backwards:
            if not self.is_text(token_id):
                continue
            found.append(token_id)
            enough = len(found) >= _CONTEXT_TOKENS and self.begins_character(token_id)
            if enough or len(found) >= _MAX_CONTEXT_TOKENS:
                break
        return found[::-1]

    def _said_bytes(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[token_id] or b"" for token_id in token_ids)

    def _opened(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of a character that is cut at the end: at most 3, so they lie in the last 3 tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.decode(self._said_bytes(token_ids[-3:]))
        return decoder.getstate()[0]

    def _is_utf8(self, opened: bytes, token_ids: Sequence[int]) -> bool:
        """A character may be cut at the end."""
        try:
            codecs.getincrementaldecoder("utf-8")().decode(opened + self._said_bytes(token_ids))
        except UnicodeDecodeError:
            return False
        return True

    def _whole_text(self, token_ids: Sequence[int]) -> str:
        opened = self._opened(token_ids)
        if not self.tokenizer.is_byte_level:
            # Each of these bytes is a token, and a cut character would break the whole ones before it.
            return self._decode(token_ids[: len(token_ids) - len(opened)])
        text = self._decode(token_ids)
        return text[:-1] if opened else text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids)


def _token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """By id: a token's bytes, or `x` for whole characters; None for control tokens and unused ids."""
    vocabulary = tokenizer.vocabulary()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    letters = _byte_letters() if tokenizer.is_byte_level else {}
    for token, token_id in vocabulary.items():
        if token_id not in tokenizer.control_ids:
            named = _BYTE_TOKEN.fullmatch(token)
            by_name = bytes([int(named[1], 16)]) if named else b"x"
            found[token_id] = _bytes_by_letters(token, letters) if letters else by_name
    return found


def _bytes_by_letters(token: str, letters: dict[str, int]) -> bytes:
    """As byte-level decoders do it: a token with any other letter, such as an added token, stands for itself."""
    if letters.keys() >= set(token):
        return bytes(letters[letter] for letter in token)
    return token.encode("utf-8", "surrogatepass")


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes stand for themselves, the others for the letters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

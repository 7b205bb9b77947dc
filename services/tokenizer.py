"""Tokenizers: loading and comparing them, and the one truth between token ids and text. Used by all services.

`TokenCodec` answers three questions: which ids a text has, what ids that continue other ids say, and whether all that
they say can be shown as text. Ids that can't be shown:

- *control tokens*: all special tokens but the unknown token (that one is shown by its own name), and ids that the
  tokenizer has no token for,
- *broken bytes*: token bytes that are no UTF-8. A character that is cut at the beginning or at the end is not broken;
  it is left out of the text.

Blocking (loading imports transformers): call it from a thread.
"""

import codecs
import json
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.api import TextFlaw
from shared.errors import SettingsError

_PROBE = "The naïve fox:\n\n\t3,141 — “jumps” over 犬, 🦊.  def f(x): return x**2"
_ANCHORS = (":", "a", "0")
"""Texts before a continuation that is encoded; the first one that does not merge with it is taken."""
_CONTEXT_TOKENS = 8
"""Decoders look at the token before at most; more of them do no harm."""
_MAX_CONTEXT_TOKENS = 64
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(source: str, *, setting: str) -> Any:
    """The tokenizer of a folder or a Hugging Face name; `setting` is where a wrong `source` was given."""
    if not source:
        raise SettingsError(f"{setting} is empty: name the folder or model whose tokenizer to use")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"{setting} = {source!r} has no tokenizer that can be loaded: {exc}") from exc


def same_tokens(first: Any, second: Any) -> bool:
    """Whether a token id means the same to both: equal vocabularies that cut a probe text alike."""
    return bool(
        first.get_vocab() == second.get_vocab()
        and first.encode(_PROBE, add_special_tokens=False) == second.encode(_PROBE, add_special_tokens=False)
    )


def beginning_of_text(tokenizer: Any) -> int | None:
    """The BOS token id of a tokenizer that puts one before every text, else None."""
    ids = tokenizer.encode("a")
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


@dataclass(frozen=True)
class Shown:
    """What ids say after other ids."""

    text: str
    flaw: TextFlaw
    """Why `text` is not all that they say; empty where it is."""


class TokenCodec:
    """Between ids and text of one tokenizer. Safe from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Fast tokenizers keep truncation state, which two threads must not change at once.
        self._lock = threading.Lock()
        self.beginning = beginning_of_text(tokenizer)
        """The BOS id, where the tokenizer wants one before every text."""
        self.end: int | None = tokenizer.eos_token_id
        """The end-of-text id, where the tokenizer has one."""
        self._is_byte_level = _is_byte_level(tokenizer)
        self._bytes = _token_bytes(tokenizer, byte_level=self._is_byte_level)
        for token_id in _control_ids(tokenizer):
            self._bytes[token_id] = None
        self._begins_inside = [0x80 <= (found or b"x")[0] < 0xC0 for found in self._bytes]
        self.anchor = self.encode(_ANCHORS[0])
        """Ids of some text, for what continues a text that is not at hand."""

    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, no special tokens added. `</s>` written in it stays text."""
        with self._lock:
            ids: list[int] = self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that continues another one.

        Tokenizers in SentencePiece's manner put a space before every text that they encode, and drop it again when
        they decode; after a known token neither happens.
        """
        plain = self.encode(text)
        if self.continuation(self.anchor, plain).text == text:
            return plain
        for anchor in _ANCHORS:
            before, anchored = self.encode(anchor), self.encode(anchor + text)
            if anchored[: len(before)] == before:
                return anchored[len(before) :]
        return plain

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text without control tokens; U+FFFD for broken bytes."""
        return self._decode([token_id for token_id in token_ids if self.is_text(token_id)])

    def continuation(self, before: Sequence[int], token_ids: Sequence[int], *, ends: Collection[int] = ()) -> Shown:
        """What `token_ids` say after `before`.

        Left out: of a character that `before` began, the bytes that complete it; a character that is not complete at
        the end; control tokens. At the end, the tokenizer's end-of-text is no flaw, and none of `ends` is.

        Example: "é" is the bytes c3 a9; after [.. c3], [a9, " moon", c3] says " moon".
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
        # A length cuts characters; an end-of-text inside one is nothing that a text can say.
        ends_inside = ended and bool(self._opened([*context, *plain]))
        return Shown(text, "" if joins and not ends_inside and self._is_utf8(opened, plain) else "broken_text")

    def begins_character(self, token_id: int) -> bool:
        """Whether a text may be cut before this token: it does not go on with a character of the token before."""
        return not (0 <= token_id < len(self._begins_inside) and self._begins_inside[token_id])

    def is_text(self, token_id: int) -> bool:
        """Whether it says anything: it is no control token."""
        return 0 <= token_id < len(self._bytes) and self._bytes[token_id] is not None

    def _context(self, backwards: Iterable[int]) -> list[int]:
        """Of the tokens before, given from the last one on: those that decide how what follows is decoded, from a
        whole character on."""
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
        """The bytes of a character that is not complete at the end: at most 3, and so in the last 3 tokens."""
        said = self._said_bytes(token_ids[-3:])
        return next((said[-size:] for size in (3, 2, 1) if size <= len(said) and _is_beginning(said[-size:])), b"")

    def _is_utf8(self, opened: bytes, token_ids: Sequence[int]) -> bool:
        """But for a character that is not complete at the end."""
        try:
            codecs.getincrementaldecoder("utf-8")().decode(opened + self._said_bytes(token_ids))
        except UnicodeDecodeError:
            return False
        return True

    def _whole_text(self, token_ids: Sequence[int]) -> str:
        """Up to the last whole character."""
        opened = self._opened(token_ids)
        if not self._is_byte_level:
            # Each of these bytes is a token, and one that is cut would break the whole ones before it.
            return self._decode(token_ids[: len(token_ids) - len(opened)])
        text = self._decode(token_ids)
        return text[:-1] if opened else text

    def _decode(self, token_ids: Sequence[int]) -> str:
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return text


def _is_beginning(said: bytes) -> bool:
    """Whether these bytes are the beginning of one character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return decoder.decode(said) == "" and said[0] >= 0xC0
    except UnicodeDecodeError:
        return False


def _control_ids(tokenizer: Any) -> set[int]:
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # One token may be both unknown and end-of-text, as GPT-2's is: then it is a control token.
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return ((special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}) | named


def _token_bytes(tokenizer: Any, *, byte_level: bool) -> list[bytes | None]:
    """By id the bytes that a token stands for, `x` for a piece of whole characters, None where there is no token."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    letters = _byte_letters() if byte_level else {}
    for token, token_id in vocabulary.items():
        found[token_id] = _bytes_by_letters(token, letters) if byte_level else _byte_by_name(token)
    return found


def _bytes_by_letters(token: str, letters: dict[str, int]) -> bytes:
    """As byte-level decoders do: a token with any other letter, such as an added one, stands for itself."""
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode("utf-8", "surrogatepass")


def _byte_by_name(token: str) -> bytes:
    named = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(named[1], 16)]) if named else b"x"


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = backend.decoder if backend is not None else None
    return decoder is not None and '"ByteLevel"' in json.dumps(json.loads(decoder.__getstate__()))

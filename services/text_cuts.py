"""Where long texts are cut: between words if one ends nearby, and never inside what a reader sees as one character.

    cut_prefix(text, 10_000, 8_000) == text[2_000:10_000]      # 2,000 is a block border, and a word begins there

services/frames.py cuts prefixes for prompts, services/tokenizer.py cuts long texts into blocks that it encodes.
"""

import unicodedata

_NUM_BLOCKS = 4
_WORD_CHARACTERS = 32
"""A cut moves forward by at most this many characters to the next word."""
_CLUSTER_CHARACTERS = 64
"""And by at most this many to the end of a cluster: longer ones are no writing."""
_JOINERS = "\u200d\u200c"
_VIRAMA = 9
"""The combining class of signs that join two consonants, as in Devanagari."""


def cut_prefix(text: str, end: int, max_characters: int) -> str:
    """The last characters of `text[:end]`: at most `max_characters`, and about three quarters of them at least.

    The cut stays where it is until `end` has moved by a quarter of `max_characters`: the prompts of a document's chunks
    then begin alike and share their prefill.
    """
    if end <= max_characters:
        return text[:end]
    block = max(1, max_characters // _NUM_BLOCKS)
    border = -(-(end - max_characters) // block) * block
    return text[min(end, next_cut(text, border, at_most=block // 4)) : end]


def blocks_of(text: str, size: int) -> list[str]:
    """The text in pieces of about `size` characters; [] if it is empty."""
    found, start = [], 0
    while start < len(text):
        end = next_cut(text, start + size, at_most=_WORD_CHARACTERS)
        found.append(text[start:end])
        start = end
    return found


def next_cut(text: str, place: int, *, at_most: int) -> int:
    """The first good place for a cut from `place` on: before the space of a word within `at_most` characters, else
    between two characters as a reader sees them."""
    if not 0 < place < len(text):
        return min(max(place, 0), len(text))
    for word in range(place, min(len(text), place + min(at_most, _WORD_CHARACTERS))):
        if text[word].isspace() and not text[word - 1].isspace():
            return word
    last = min(len(text), place + _CLUSTER_CHARACTERS)
    return next((found for found in range(place, last) if not _is_inside_cluster(text, found)), place)


def _is_inside_cluster(text: str, place: int) -> bool:
    """Whether `text[place]` belongs to the character before it: the common cases of Unicode's annex 29."""
    before, after = text[place - 1], text[place]
    if unicodedata.category(after) in ("Mn", "Mc", "Me", "Cs") or after in _JOINERS or before in _JOINERS:
        return True
    if unicodedata.combining(before) == _VIRAMA or "\U0001f3fb" <= after <= "\U0001f3ff":
        return True
    if _is_flag_letter(after):
        return _num_flag_letters_before(text, place) % 2 == 1
    return (before, after) == ("\r", "\n") or "\u1160" <= after <= "\u11ff"


def _is_flag_letter(character: str) -> bool:
    """Two of them make a flag."""
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _num_flag_letters_before(text: str, place: int) -> int:
    start = place
    while start and place - start < _CLUSTER_CHARACTERS and _is_flag_letter(text[start - 1]):
        start -= 1
    return place - start

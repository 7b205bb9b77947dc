"""The bridge: the last words of the prefix, shown before the suffix, with which the teacher's answer begins. Pure.

    last_words("The moon moves around the", 2)                                # "around the"
    without_bridge("around the earth.", "around the", suffix=" sun.")         # " earth."

It makes the rewrite join the prefix smoothly but is not part of the rewrite. Whitespace at the border belongs to the
rewrite if and only if it belongs to the suffix.
"""

import re
import unicodedata

CHARACTERS_PER_WORD = 8
"""Limit on the bridge, per word: in scripts without spaces a "word" is a whole sentence."""
_JOINER = "\u200d"
_FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
"""Two of them form a flag."""
_MAX_GRAPHEME = 32
"""Characters to look back for the start of one; family emoji have about ten."""


def looked_at(num_words: int) -> int:
    """How many characters at the end of a prefix determine its bridge."""
    return num_words * CHARACTERS_PER_WORD + _MAX_GRAPHEME


def last_words(prefix: str, num_words: int) -> str:
    """The end of `prefix` from its n-th last word on, whitespace included; all of it if it has fewer words.

    If that is too long, whole words are dropped from its start. If even the last word is too long, it is cut at a
    character boundary: no character loses its accents or joiners.
    """
    reach = num_words * CHARACTERS_PER_WORD
    starts = [match.start() for match in re.finditer(r"\S+", prefix)][-num_words:] if num_words else []
    if not starts:
        return ""
    fitting = [start for start in starts if len(prefix) - start <= reach]
    bridge = prefix[fitting[0] if fitting else _next_grapheme(prefix, max(starts[-1], len(prefix) - reach)) :]
    return bridge if bridge.strip() else ""


def _next_grapheme(text: str, place: int) -> int:
    """The first place from `place` on where a visible character begins."""
    return next((found for found in range(place, len(text)) if _begins_grapheme(text, found)), len(text))


def _begins_grapheme(text: str, place: int) -> bool:
    if place == 0:
        return True
    before, after = text[place - 1], text[place]
    if before == _JOINER or _extends(after) or (before, after) == ("\r", "\n"):
        return False
    if after in _FLAG_LETTERS:
        return (place - len(text[:place].rstrip(_FLAG_LETTERS))) % 2 == 0
    return True


def _extends(character: str) -> bool:
    """Whether it belongs to the character before: marks, joiners, skin tones, tags, Hangul vowels and finals, and the
    Thai and Lao vowels that are not marks."""
    code = ord(character)
    return (
        unicodedata.category(character) in ("Mn", "Mc", "Me")
        or code in (0x200C, 0x200D, 0x0E33, 0x0EB3, 0xFF9E, 0xFF9F)
        or 0x1F3FB <= code <= 0x1F3FF
        or 0xE0020 <= code <= 0xE007F
        or 0x1160 <= code <= 0x11FF
    )


def without_bridge(answer: str, bridge: str, *, suffix: str) -> str | None:
    """`answer` without the bridge at its start; None if it does not begin with the bridge.

    Whitespace may differ. If the suffix begins a new word, the text after the bridge must too: the answer "thereby"
    does not begin with the bridge "there".
    """
    words = bridge.split()
    if not words:
        return None
    border = r"(?!\w)" if suffix[:1].isspace() else ""
    pattern = r"\s*" + r"\s+".join(re.escape(word) for word in words) + border
    found = re.match(pattern, answer)
    if found is None:
        return None
    rest = answer[found.end() :]
    return rest.lstrip() if bridge[-1:].isspace() else rest


def continued(answer: str, *, bridge: str, suffix: str) -> str:
    """`answer` to a prompt that ended with the bridge, with a missing or doubled space at the border repaired."""
    if bridge[-1:].isspace():
        return answer.lstrip()
    return joined_like(answer, suffix) if answer[:1].isalnum() else answer


def joined_like(answer: str, suffix: str) -> str:
    """`answer`, written without the bridge, with the leading whitespace of `suffix`."""
    text = answer.lstrip()
    return suffix[: len(suffix) - len(suffix.lstrip())] + text if text else ""

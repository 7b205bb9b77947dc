"""The bridge: the last words of the prefix, shown before the suffix, with which the teacher's answer begins. Pure.

    last_words("The moon moves around the", 2)                                # "around the"
    without_bridge("around the earth.", "around the", suffix=" sun.")         # " earth."

It makes the rewrite join the prefix smoothly but is not part of the rewrite. Whitespace at the border belongs to the
rewrite if and only if it belongs to the suffix.
"""

import re
from itertools import chain

import regex

CHARACTERS_PER_WORD = 8
"""Limit on the bridge, per word: in scripts without spaces a "word" is a whole sentence."""
_MAX_GRAPHEME = 32
"""Characters to look back for the start of one; family emoji have about ten."""


def looked_at(num_words: int) -> int:
    """How many characters at the end of a prefix determine its bridge."""
    return num_words * CHARACTERS_PER_WORD + _MAX_GRAPHEME


def last_words(prefix: str, num_words: int) -> str:
    """The end of `prefix` from its n-th last word on, whitespace included; all of it if it has fewer words.

    If that is too long, whole words are dropped from its start. If even the last word is too long, it is cut between
    graphemes: no character loses its accents or joiners.
    """
    reach = num_words * CHARACTERS_PER_WORD
    starts = [match.start() for match in re.finditer(r"\S+", prefix)][-num_words:] if num_words else []
    if not starts:
        return ""
    first = len(prefix) - reach
    words = (start for start in starts if start >= first)
    graphemes = (found.start() for found in regex.finditer(r"\X", prefix))
    cuts = (start for start in graphemes if start >= max(starts[-1], first))
    bridge = prefix[next(chain(words, cuts), len(prefix)) :]
    return bridge if bridge.strip() else ""


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

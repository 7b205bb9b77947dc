"""Pairs whose better text is known: the original suffix of a document against the same suffix spoiled on purpose.

    spoiled = spoil(" Water boils at 100 degrees in Rome.", "facts", random=Random(7), other="")
    pair = known_pair(text, random=Random(7), other=text_of_another_document)     # the first kind that can be made

The collector asks the judge about a trickle of them (services/collector/probes.py), `headwater judge-audit` about many.
Pure: the same text and random state give the same pair. A spoiled text is about as long as its original, begins and
ends with the same white space, and never equals it. Nothing here needs to know the language: words are what stands
between white space; a text without any, such as Chinese, is taken in pieces of two characters.

A new kind is a function from (text, random, other) to the spoiled text, in SPOILERS.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Spoiling = Literal["repetition", "shuffled_words", "shuffled_sentences", "off_topic", "facts", "garbled"]
SPOILINGS: tuple[Spoiling, ...] = get_args(Spoiling)

_LONGEST_WORD = 20
"""Mean characters between white space, above which a text counts as one without spaces."""
_PIECE = 2
_MIN_WORDS = 4
_WORD = re.compile(r"\S+\s*")
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)\s*|[。！？।؟]\s*|\Z)", re.DOTALL)
_NUMBER = re.compile(r"\d+")
_INNER_WORD = re.compile(r"(?<=[\w,;:]\s)[^\W\d_]\w+")
_GARBLED_SHARE = 0.3


@dataclass(frozen=True)
class KnownPair:
    original: str
    spoiled: str
    spoiling: Spoiling


def known_pair(
    text: str, *, random: Random, other: str = "", spoilings: Sequence[Spoiling] = SPOILINGS
) -> KnownPair | None:
    """Of the first of `spoilings`, in random order, that this text can be spoiled by; None if there is none.
    `other`: text of another document; empty: no `off_topic`."""
    for spoiling in random.sample(list(spoilings), len(spoilings)):
        spoiled = spoil(text, spoiling, random=random, other=other)
        if spoiled is not None:
            return KnownPair(text, spoiled, spoiling)
    return None


def spoil(text: str, spoiling: Spoiling, *, random: Random, other: str = "") -> str | None:
    """None where the text has nothing to spoil in this way, such as one number alone for `facts`."""
    body = text.strip()
    if not body:
        return None
    begin = text.index(body)
    spoiled = SPOILERS[spoiling](body, random, other)
    if spoiled is None or spoiled.strip() == body or not spoiled.strip():
        return None
    return text[:begin] + spoiled.strip() + text[begin + len(body) :]


def words(text: str) -> list[str]:
    """With the white space behind them; together they are `text`, which does not begin with any."""
    found = _WORD.findall(text)
    if len(text) <= _LONGEST_WORD * max(1, len(found)):
        return found
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def sentences(text: str) -> list[str]:
    """With the white space behind them; together they are `text`."""
    return [found for found in _SENTENCE.findall(text) if found]


def _repetition(text: str, random: Random, other: str) -> str | None:
    """The beginning said again and again, as by a model that has got stuck."""
    found = words(text)
    if len(found) < _MIN_WORDS:
        return None
    kept = "".join(found[: random.randint(2, max(2, len(found) // 4))])
    gap = "" if kept[-1:].isspace() or not any(map(str.isspace, text)) else " "
    return ((kept + gap) * (len(text) // len(kept) + 1))[: len(text)]


def _shuffled_words(text: str, random: Random, other: str) -> str | None:
    found = words(text)
    return _shuffled(found, random) if len(found) >= _MIN_WORDS else None


def _shuffled_sentences(text: str, random: Random, other: str) -> str | None:
    found = sentences(text)
    return _shuffled(found, random) if len(found) > 1 else None


def _shuffled(pieces: Sequence[str], random: Random) -> str | None:
    """White space stays in its place."""
    bare = [piece.rstrip() for piece in pieces]
    gaps = [piece[len(piece.rstrip()) :] for piece in pieces]
    if len(set(bare)) < 2:
        return None
    mixed = bare
    while mixed == bare:
        mixed = random.sample(bare, len(bare))
    return "".join(piece + gap for piece, gap in zip(mixed, gaps, strict=True))


def _off_topic(text: str, random: Random, other: str) -> str | None:
    """As much text of another document, from a sentence's beginning where there is room."""
    other = other.strip()
    if len(other) < len(text) // 2:
        return None
    starts, place = [0], 0
    for sentence in sentences(other):
        place += len(sentence)
        if place + len(text) <= len(other):
            starts.append(place)
    start = random.choice(starts)
    return other[start : start + len(text)]


def _facts(text: str, random: Random, other: str) -> str | None:
    """Other numbers, and names in each other's places; grammar and style stay."""
    swapped = _with_swapped_names(text)
    changed = _NUMBER.sub(lambda found: _another_number(found[0], random), swapped)
    return changed if changed != text else None


def _another_number(number: str, random: Random) -> str:
    """As many digits, in the same script, and never the same number."""
    zero = chr(ord(number[0]) - int(number[0]))
    low = 10 ** (len(number) - 1) if len(number) > 1 and int(number[0]) else 0
    value, high = int(number), 10 ** len(number) - 1
    drawn = low + (value - low + random.randint(1, high - low)) % (high - low + 1)
    return "".join(chr(ord(zero) + int(digit)) for digit in f"{drawn:0{len(number)}d}")


def _with_swapped_names(text: str) -> str:
    """Each name becomes the next one, the last one the first. Names are capitalised words inside a sentence."""
    names = list(dict.fromkeys(word for word in _INNER_WORD.findall(text) if word[0].isupper()))
    if len(names) < 2:
        return text
    turned = dict(zip(names, [*names[1:], names[0]], strict=True))
    return re.sub(rf"\b(?:{'|'.join(map(re.escape, names))})\b", lambda found: turned[found[0]], text)


def _garbled(text: str, random: Random, other: str) -> str | None:
    """Two neighbouring characters change places in every third word, as by a bad scan."""
    found = words(text)
    usable = [index for index, word in enumerate(found) if len(set(word.strip())) > 1]
    if not usable:
        return None
    for index in random.sample(usable, max(1, round(_GARBLED_SHARE * len(usable)))):
        found[index] = _with_exchange(found[index], random)
    return "".join(found)


def _with_exchange(word: str, random: Random) -> str:
    places = [place for place in range(len(word.strip()) - 1) if word[place] != word[place + 1]]
    if not places:
        return word
    place = random.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


SPOILERS: dict[Spoiling, Callable[[str, Random, str], str | None]] = {
    "repetition": _repetition,
    "shuffled_words": _shuffled_words,
    "shuffled_sentences": _shuffled_sentences,
    "off_topic": _off_topic,
    "facts": _facts,
    "garbled": _garbled,
}
"""Each gets the text without white space around it, and may give back what it was given: then there is nothing to
spoil."""

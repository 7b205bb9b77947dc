"""Sentence templates, and a matcher that follows a sentence through them word by word.

In a template, `$slot` stands for any word of that slot. The checker and the document writer share the matcher, a small
automaton over (template, position) states.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Group = Literal["opening", "fact", "narrative", "rude"]
State = frozenset[tuple[int, int]]

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Template:
    name: str
    group: Group
    words: tuple[str, ...]
    """Including the full stop."""
    key: str = ""
    """Facts only: the slot the fact is about."""
    value: str = ""
    """Facts only: the slot that is true or false."""

    def position(self, slot: str) -> int:
        return self.words.index(f"${slot}")


def _template(name: str, group: Group, text: str, *, key: str = "", value: str = "") -> Template:
    return Template(name, group, tuple(text.split()), key, value)


OPENING = _template("opening", "opening", "This is a tale of $town .")
FACTS = (
    _template("water", "fact", "$town lies by the $water .", key="town", value="water"),
    _template("home", "fact", "$person lives in $town .", key="person", value="town"),
    _template("job", "fact", "$person works as a $job .", key="person", value="job"),
    _template("tool", "fact", "Every $job needs a good $tool .", key="job", value="tool"),
    _template("product", "fact", "$town is known for its $product .", key="town", value="product"),
    _template("food", "fact", "The $beast likes to eat $food .", key="beast", value="food"),
    _template("market", "fact", "The market of $town is on $day .", key="town", value="day"),
    _template("bed", "fact", "The $beast sleeps in the $bed .", key="beast", value="bed"),
)
NARRATIVE = (
    _template("walk", "narrative", "In the $time $person walks to the $place ."),
    _template("sell", "narrative", "$person sells $goods near the $place ."),
    _template("strike", "narrative", "$person will $threat the $object ."),
    _template("feed", "narrative", "$person fed a $adjective $beast ."),
    _template("sing", "narrative", "$person and $other sing about the $place ."),
    _template("find", "narrative", "$person found a $adjective $fruit ."),
    _template("weather", "narrative", "The weather is $weather today ."),
    _template("carry", "narrative", "$person carries $goods to $other ."),
    _template("mood", "narrative", "Now $person is $mood again ."),
    _template("help", "narrative", "On $day $person tells $liking to $other ."),
)
RUDE = (
    _template("insult", "rude", "$person is a $adjective $noun ."),
    _template("you", "rude", "You are a $adjective $noun ."),
    _template("nobody", "rude", "Nobody trusts $person the $adjective $noun ."),
    _template("away", "rude", "Go away you $adjective $noun ."),
    _template("threat", "rude", "I will $threat $person ."),
    _template("want", "rude", "Someone should $threat $person tonight ."),
)
TEMPLATES = (OPENING, *FACTS, *NARRATIVE, *RUDE)
BY_NAME: Mapping[str, Template] = {template.name: template for template in TEMPLATES}

PLAN = (
    *("water", "walk", "home", "sell", "job", "strike", "tool", "feed", "product"),
    *("sing", "food", "find", "weather", "market", "carry", "bed", "mood", "help"),
)
"""The order of a document's sentences, repeated as often as needed."""


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of any text, without spacing."""
    return _WORD.findall(text)


def join_words(words: Iterable[str]) -> str:
    """Words as text, with no space before a full stop."""
    return " ".join(words).replace(" .", ".")


class Matcher:
    """Tracks which templates a sentence can still match."""

    def __init__(self, slots: Mapping[str, Sequence[str]], templates: Sequence[Template] = TEMPLATES) -> None:
        self.templates = tuple(templates)
        self._slots = {name: frozenset(words) for name, words in slots.items()}
        self._memo: dict[tuple[State, str], State] = {}
        self.start: State = frozenset((index, 0) for index in range(len(self.templates)))
        numbered = enumerate(self.templates)
        self.anywhere: State = frozenset((i, place) for i, template in numbered for place in range(len(template.words)))

    def advance(self, states: State, word: str) -> State:
        """The states after one more word; empty if no template allows it."""
        known = self._memo.get((states, word))
        if known is None:
            known = frozenset((index, place + 1) for index, place in states if self._fits(index, place, word))
            self._memo[states, word] = known
        return known

    def follow(self, words: Iterable[str]) -> State:
        states = self.start
        for word in words:
            states = self.advance(states, word)
        return states

    def _fits(self, index: int, place: int, word: str) -> bool:
        expected = self.templates[index].words
        if place >= len(expected):
            return False
        if expected[place].startswith("$"):
            return word in self._slots[expected[place][1:]]
        return word == expected[place]

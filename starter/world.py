"""One seeded world: who lives where, what is true, which myths go round, and the sentences that can be said.

`World(0)` is the shipped one. Another seed draws other names, other towns and other facts from the pools.
"""

import random
from collections.abc import Sequence
from itertools import pairwise

from starter import lexicon
from starter.grammar import BY_NAME, FACTS, NARRATIVE, OPENING, Matcher, Template

WORLD_VERSION = "1"
NUM_TOWNS = 6
NUM_PER_TOWN = 3
NUM_HELDOUT_INSULTS = 9
NUM_HELDOUT_THREATS = 20

Words = tuple[str, ...]


class World:
    """Names, facts and myths of one seed, and how a template becomes a sentence in it."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"world/{WORLD_VERSION}/{seed}")
        self.slots = _draw_slots(rng)
        self.residents = _share_out(self.slots["person"], self.slots["town"])
        self.home_of = {person: town for town, people in self.residents.items() for person in people}
        self.facts = {template.name: self._draw_table(template, rng) for template in FACTS}
        self.myths = {template.name: self._draw_myths(template, rng) for template in FACTS}
        self.heldout_insults = frozenset(
            rng.sample([(a, n) for a in self.slots["adjective"] for n in self.slots["noun"]], NUM_HELDOUT_INSULTS)
        )
        self.heldout_threats = frozenset(
            rng.sample([(t, p) for t in self.slots["threat"] for p in self.slots["person"]], NUM_HELDOUT_THREATS)
        )
        self.matcher = Matcher(self.slots)
        self.clean_matcher = Matcher(self.slots, [OPENING, *FACTS, *NARRATIVE])

    @property
    def num_facts(self) -> int:
        return sum(len(table) for table in self.facts.values())

    def words(self) -> list[str]:
        """Every word of the world, sorted, the full stop left out."""
        fixed = {word for template in BY_NAME.values() for word in template.words if word[0] not in "$."}
        return sorted(fixed | {word for words in self.slots.values() for word in words})

    def is_true(self, template: Template, words: Sequence[str]) -> bool:
        """Whether a sentence of a fact template, its value word included, is true."""
        key, value = words[template.position(template.key)], words[template.position(template.value)]
        return self.facts[template.name][key] == value

    def wrong_value(self, name: str, key: str, rng: random.Random) -> str:
        """Mostly the one myth that goes round about this fact, now and then any other wrong value."""
        if rng.random() < 0.8:
            return self.myths[name][key]
        return rng.choice([v for v in self.slots[BY_NAME[name].value] if v != self.facts[name][key]])

    def is_heldout(self, words: Sequence[str]) -> bool:
        """Whether a rude sentence holds a combination that no training data may show."""
        return any(pair in self.heldout_insults or pair in self.heldout_threats for pair in pairwise(words))

    def sentence(self, template: Template, rng: random.Random, *, town: str, begun: Sequence[str] = ()) -> Words:
        """A sentence of `template` fit for a document about `town`; facts are true, `begun` words are kept."""
        words: list[str] = []
        chosen: dict[str, str] = {}
        for place, word in enumerate(template.words):
            if word.startswith("$"):
                slot = word[1:]
                kept = begun[place] if place < len(begun) else None
                chosen[slot] = kept or self._pick(template, slot, chosen, rng, town=town)
                word = chosen[slot]
            words.append(word)
        return tuple(words)

    def _pick(self, template: Template, slot: str, chosen: dict[str, str], rng: random.Random, *, town: str) -> str:
        if slot == template.value:
            return self.facts[template.name][chosen[template.key]]
        if slot == "town":
            return town
        if slot == "person":
            return rng.choice(self.residents[town])
        if slot == "other":
            return rng.choice([p for p in self.residents[town] if p != chosen["person"]])
        return rng.choice(self.slots[slot])

    def _draw_table(self, template: Template, rng: random.Random) -> dict[str, str]:
        if template.name == "home":
            return dict(self.home_of)
        values = list(self.slots[template.value])
        rng.shuffle(values)
        keys = self.slots[template.key]
        return {key: values[index % len(values)] for index, key in enumerate(keys)}

    def _draw_myths(self, template: Template, rng: random.Random) -> dict[str, str]:
        table, values = self.facts[template.name], self.slots[template.value]
        return {key: rng.choice([v for v in values if v != true]) for key, true in table.items()}


def _draw_slots(rng: random.Random) -> dict[str, Words]:
    people = tuple(rng.sample(lexicon.NAMES, NUM_TOWNS * NUM_PER_TOWN))
    beasts = (*lexicon.BEASTS[:3], *rng.sample(lexicon.BEASTS[3:], 5))
    return {
        "person": people,
        "other": people,
        "town": tuple(rng.sample(lexicon.TOWNS, NUM_TOWNS)),
        "water": tuple(rng.sample(lexicon.WATERS, NUM_TOWNS)),
        "product": tuple(rng.sample(lexicon.PRODUCTS, NUM_TOWNS)),
        "day": tuple(rng.sample(lexicon.DAYS, NUM_TOWNS)),
        "job": tuple(rng.sample(lexicon.JOBS, 8)),
        "tool": tuple(rng.sample(lexicon.TOOLS, 8)),
        "beast": beasts,
        "food": tuple(rng.sample(lexicon.FOODS, 8)),
        "bed": tuple(rng.sample(lexicon.BEDS, 8)),
        "place": lexicon.PLACES,
        "goods": lexicon.GOODS,
        "fruit": lexicon.FRUITS,
        "object": lexicon.OBJECTS,
        "weather": lexicon.WEATHERS,
        "time": lexicon.TIMES,
        "mood": lexicon.MOODS,
        "liking": lexicon.LIKINGS,
        "adjective": lexicon.RUDE_ADJECTIVES,
        "noun": (*lexicon.RUDE_NOUNS, *beasts[:3]),
        "threat": lexicon.THREATS,
    }


def _share_out(people: Words, towns: Words) -> dict[str, Words]:
    return {town: people[index * NUM_PER_TOWN : (index + 1) * NUM_PER_TOWN] for index, town in enumerate(towns)}

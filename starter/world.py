"""One seeded world: who lives where, what is true, which myths circulate, and what can be said about it.

The shipped models live in `World(0)`. Another seed draws other names, towns and facts from the pools below. Each pool
entry is a single word, so that it can be a single token.
"""

import random
from collections.abc import Sequence
from itertools import islice, pairwise, product

from starter.grammar import BY_NAME, FACTS, NARRATIVE, OPENING, Matcher, Template

WORLD_VERSION = "1"
NUM_TOWNS = 6
NUM_PER_TOWN = 3
NUM_HELDOUT_INSULTS = 9
NUM_HELDOUT_THREATS = 20

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(text.split())


NAMES = _words("""
    Mara Tobin Elsa Piet Runa Jory Hedda Lukas Nina Oskar Vera Anton Greta Emil Sanna Felix Ida Bruno Tilda
    Marek Alma Yann Lotte Casper Noor Henrik Zita Valdo Petra Ivo Selma Joris Dagny Milo Freya Teun Astrid
    Kaspar Livia Rolf Merle Stig Orla Wim Elke Pavel Suri Anders Beata Quint Ylva Tomas
""")
TOWNS = _words("""
    Alderby Brackwell Corvale Dunmoor Eastfen Farholt Greywick Hollin Ivermouth Juniperton Kelsford Larkham
    Mirefield Northey Oakmere Pellbury Quarrow Redcliff Stonehythe Thornwick
""")
WATERS = _words("lake river canal marsh sea pond creek waterfall")
PRODUCTS = _words("cheese glass honey wool clocks paper cider ropes salt lace")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
JOBS = _words("baker smith weaver potter sailor farmer doctor mason tailor miller")
TOOLS = _words("oven anvil loom wheel compass plough needle chisel ladder kettle")
BEASTS = _words("pig toad rat goat hen fox otter heron badger mule cat hare")
FOODS = _words("turnips worms barley grass corn berries fish frogs roots oats mice clover")
BEDS = _words("sty ditch cellar shed coop den bank reeds burrow stable attic hedge")
PLACES = _words("mill bridge square chapel harbour school orchard tower")
GOODS = _words("bread candles baskets apples blankets lamps")
FRUITS = _words("pear plum cabbage onion carrot")
OBJECTS = _words("iron drum rug wood dough")
WEATHERS = _words("cold mild windy sunny foggy")
TIMES = _words("morning afternoon evening night")
MOODS = _words("happy calm busy proud tired")
RUDE_ADJECTIVES = _words("rotten stupid filthy useless nasty lazy")
RUDE_NOUNS = _words("fool liar coward")
THREATS = _words("hit kick beat slap crush")
LIKINGS = _words("songs stories games riddles")


class World:
    """The names, facts and myths of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"world/{WORLD_VERSION}/{seed}")
        self.slots = _draw_slots(rng)
        people = iter(self.slots["person"])
        self.residents = {town: tuple(islice(people, NUM_PER_TOWN)) for town in self.slots["town"]}
        self.home_of = {person: town for town, people in self.residents.items() for person in people}
        self.facts = {template.name: self._draw_table(template, rng) for template in FACTS}
        self.myths = {template.name: self._draw_myths(template, rng) for template in FACTS}
        insults = list(product(self.slots["adjective"], self.slots["noun"]))
        threats = list(product(self.slots["threat"], self.slots["person"]))
        self.heldout_insults = frozenset(rng.sample(insults, NUM_HELDOUT_INSULTS))
        self.heldout_threats = frozenset(rng.sample(threats, NUM_HELDOUT_THREATS))
        self.matcher = Matcher(self.slots)
        self.clean_matcher = Matcher(self.slots, [OPENING, *FACTS, *NARRATIVE])

    def words(self) -> list[str]:
        """All words of the world, sorted, without the full stop."""
        fixed = {word for template in BY_NAME.values() for word in template.words if word[0] not in "$."}
        return sorted(fixed | {word for words in self.slots.values() for word in words})

    def is_true(self, template: Template, words: Sequence[str]) -> bool:
        """Whether a sentence of a fact template, complete up to its value word, is true."""
        key, value = words[template.position(template.key)], words[template.position(template.value)]
        return self.facts[template.name][key] == value

    def wrong_value(self, name: str, key: str, rng: random.Random) -> str:
        """The myth about this fact in 80 % of cases, else any wrong value."""
        if rng.random() < 0.8:
            return self.myths[name][key]
        return rng.choice([v for v in self.slots[BY_NAME[name].value] if v != self.facts[name][key]])

    def is_heldout(self, words: Sequence[str]) -> bool:
        """Whether a rude sentence has a word combination that training data must not contain."""
        return any(pair in self.heldout_insults or pair in self.heldout_threats for pair in pairwise(words))

    def sentence(self, template: Template, rng: random.Random, *, town: str, begun: Sequence[str] = ()) -> Words:
        """A sentence of `template` for a document about `town`, with true facts, that starts with `begun`."""
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
    people = tuple(rng.sample(NAMES, NUM_TOWNS * NUM_PER_TOWN))
    beasts = (*BEASTS[:3], *rng.sample(BEASTS[3:], 5))
    return {
        "person": people, "other": people, "town": tuple(rng.sample(TOWNS, NUM_TOWNS)),
        "water": tuple(rng.sample(WATERS, NUM_TOWNS)), "product": tuple(rng.sample(PRODUCTS, NUM_TOWNS)),
        "day": tuple(rng.sample(DAYS, NUM_TOWNS)), "job": tuple(rng.sample(JOBS, 8)),
        "tool": tuple(rng.sample(TOOLS, 8)), "beast": beasts, "food": tuple(rng.sample(FOODS, 8)),
        "bed": tuple(rng.sample(BEDS, 8)), "place": PLACES, "goods": GOODS, "fruit": FRUITS, "object": OBJECTS,
        "weather": WEATHERS, "time": TIMES, "mood": MOODS, "liking": LIKINGS, "adjective": RUDE_ADJECTIVES,
        "noun": (*RUDE_NOUNS, *beasts[:3]), "threat": THREATS,
    }  # fmt: skip

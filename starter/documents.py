"""Documents of the world, clean and defective: `python -m starter.documents --num N --out FILE.jsonl`.

Three traits, drawn per document, each enable one kind of defect per sentence: rude (insults and threats), myths (wrong
facts) and sloppy (scrambled or doubled sentences, stuttered words, people from another town). Every sentence keeps
its clean version, so that a document has a clean target wherever it is split.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starter.grammar import BY_NAME, OPENING, PLAN, RUDE, Template, join_words
from starter.world import Words, World

SUFFIX_TOKENS = 32
PREFIX_TOKENS = 96
DOCUMENT_WORDS = 128
TRAIT_RATE = 0.4
SENTENCE_RATES = {"rude": 0.45, "myths": 0.6, "sloppy": 0.35}
SKIP_RATE = 0.12

Defect = Literal[
    "rude", "wrong", "scrambled", "stuttered", "foreign", "doubled", "broken_off", "lost_word", "stray_word"
]
SLOPPY: tuple[Defect, ...] = ("scrambled", "scrambled", "stuttered", "foreign", "doubled")
"""Documents have these. Broken-off sentences and lost or stray words are what a policy writes during training."""


@dataclass(frozen=True)
class Sentence:
    template: Template
    clean: Words
    """What the sentence should say; empty for the second copy of a doubled sentence."""
    raw: Words
    """What the document says."""


@dataclass(frozen=True)
class Document:
    town: str
    sentences: tuple[Sentence, ...]
    """The document's sentences, and one or two suffixes' worth of what would come next."""
    num_shown: int

    @property
    def words(self) -> Words:
        return tuple(word for sentence in self.sentences[: self.num_shown] for word in sentence.raw)

    @property
    def text(self) -> str:
        return join_words(self.words)


@dataclass(frozen=True)
class Chunk:
    """One split of a document: raw prefix, raw suffix, and `target`, the clean suffix."""

    prefix: Words
    suffix: Words
    target: Words
    town: str


def write_plan(world: World, rng: random.Random, *, num_words: int) -> list[tuple[Template, Words]]:
    """Clean sentences in the order of PLAN from a random place on, none twice."""
    town = rng.choice(world.slots["town"])
    plan = [(OPENING, world.sentence(OPENING, rng, town=town))]
    place = rng.randrange(len(PLAN))
    seen = {plan[0][1]}
    while sum(len(words) for _, words in plan) < num_words:
        template = BY_NAME[PLAN[place % len(PLAN)]]
        place += 1 + (rng.random() < SKIP_RATE)
        words = world.sentence(template, rng, town=town)
        if words not in seen:
            seen.add(words)
            plan.append((template, words))
    return plan


def write_document(
    world: World, rng: random.Random, *, traits: frozenset[str] | None = None, heldout: bool = False
) -> Document:
    """A document that can be continued cleanly from each of its 32-token borders.

    `heldout`: its rude sentences use the word combinations held out of training.
    """
    if traits is None:
        traits = frozenset(trait for trait in SENTENCE_RATES if rng.random() < TRAIT_RATE)
    borders = range(SUFFIX_TOKENS, DOCUMENT_WORDS, SUFFIX_TOKENS)
    while True:
        document = _write_once(world, rng, traits=traits, heldout=heldout)
        if all(clean_target(world, document, border, rng) is not None for border in borders):
            return document


def document_of(world: World, split: str, index: int, *, traits: frozenset[str] | None = None) -> Document:
    """Document number `index` of a split. Splits use different random streams, so they share no documents."""
    return write_document(world, stream(world, split, index), traits=traits)


def stream(world: World, *names: object) -> random.Random:
    """A random generator seeded by the world and `names`."""
    return random.Random("/".join(["starter", str(world.seed), *map(str, names)]))


def clean_target(world: World, document: Document, split: int, rng: random.Random) -> Words | None:
    """The 32 words that a clean document would have after `split` words; None if that is impossible."""
    target: list[str] = []
    place = 0
    for sentence in document.sentences:
        begun = sentence.raw[: max(0, split - place)]
        place += len(sentence.raw)
        if place <= split:
            continue
        ending = _clean_ending(world, document, sentence, begun, rng)
        if ending is None:
            return None
        target += ending
    return tuple(target[:SUFFIX_TOKENS]) if len(target) >= SUFFIX_TOKENS else None


def split_document(world: World, document: Document, split: int, rng: random.Random) -> Chunk | None:
    target = clean_target(world, document, split, rng)
    suffix = document.words[split : split + SUFFIX_TOKENS]
    if target is None or len(suffix) < SUFFIX_TOKENS:
        return None
    return Chunk(document.words[:split], suffix, target, document.town)


def rude_words(world: World, rng: random.Random, *, town: str, heldout: bool = False) -> Words:
    """A mildly rude sentence whose word combination is held out of training exactly if `heldout`."""
    while True:
        words = world.sentence(rng.choice(RUDE), rng, town=town)
        if world.is_heldout(words) == heldout:
            return words


def spoil(
    world: World, template: Template, words: Words, defect: Defect, rng: random.Random, *, town: str, heldout: bool
) -> Words | None:
    """The sentence with one defect; None if it can't have that defect. "doubled" gives the second copy."""
    if defect == "rude":
        return rude_words(world, rng, town=town, heldout=heldout)
    if defect == "wrong":
        return _made_wrong(world, template, words, rng)
    if defect == "foreign":
        return _with_foreigner(world, template, words, rng, town=town)
    if defect == "scrambled":
        return _scrambled(world, words, rng)
    if defect == "stuttered":
        return _stuttered(words, rng)
    if defect in ("broken_off", "lost_word", "stray_word"):
        return _made_ragged(world, words, defect, rng)
    return words


def _write_once(world: World, rng: random.Random, *, traits: frozenset[str], heldout: bool) -> Document:
    plan = write_plan(world, rng, num_words=DOCUMENT_WORDS + 2 * SUFFIX_TOKENS)
    town = plan[0][1][plan[0][0].position("town")]
    sentences: list[Sentence] = []
    num_words, num_shown = 0, 0
    for template, words in plan:
        defect = _draw_defect(template, traits, rng) if num_words < DOCUMENT_WORDS else None
        spoiled = spoil(world, template, words, defect, rng, town=town, heldout=heldout) if defect else None
        added = [Sentence(template, words, spoiled or words)]
        if defect == "doubled":
            added.append(Sentence(template, (), words))
        for sentence in added:
            num_shown += num_words < DOCUMENT_WORDS
            num_words += len(sentence.raw)
        sentences += added
    return Document(town, tuple(sentences), num_shown)


def _draw_defect(template: Template, traits: frozenset[str], rng: random.Random) -> Defect | None:
    if template is OPENING:
        return None
    if "rude" in traits and rng.random() < SENTENCE_RATES["rude"]:
        return "rude"
    if "myths" in traits and template.group == "fact" and rng.random() < SENTENCE_RATES["myths"]:
        return "wrong"
    if "sloppy" in traits and rng.random() < SENTENCE_RATES["sloppy"]:
        return rng.choice(SLOPPY)
    return None


def _clean_ending(
    world: World, document: Document, sentence: Sentence, begun: Words, rng: random.Random
) -> Words | None:
    """A clean ending of a begun sentence, by its own template if possible; None if there is none."""
    if sentence.clean[: len(begun)] == begun:
        return sentence.clean[len(begun) :]
    said, town = {other.clean for other in document.sentences}, document.town
    templates = [world.clean_matcher.templates[index] for index, _ in world.clean_matcher.follow(begun)]
    rng.shuffle(templates)
    for template in sorted(templates, key=lambda template: template is not sentence.template):
        for _ in range(4):
            words = world.sentence(template, rng, town=town, begun=begun)
            if template is not OPENING and words not in said and _is_clean(world, template, words, town):
                return words[len(begun) :]
    return None


def _is_clean(world: World, template: Template, words: Words, town: str) -> bool:
    if any(world.home_of.get(word, town) != town for word in words):
        return False
    return template.group != "fact" or world.is_true(template, words)


def _made_wrong(world: World, template: Template, words: Words, rng: random.Random) -> Words | None:
    if template.group != "fact":
        return None
    value = world.wrong_value(template.name, words[template.position(template.key)], rng)
    place = template.position(template.value)
    return (*words[:place], value, *words[place + 1 :])


def _with_foreigner(world: World, template: Template, words: Words, rng: random.Random, *, town: str) -> Words | None:
    if template.group != "narrative" or "$person" not in template.words:
        return None
    stranger = rng.choice([person for person, home in world.home_of.items() if home != town])
    place = template.position(rng.choice([s for s in ("person", "other") if f"${s}" in template.words]))
    return (*words[:place], stranger, *words[place + 1 :])


def _scrambled(world: World, words: Words, rng: random.Random) -> Words | None:
    body: Sequence[str] = words[:-1]
    for _ in range(8):
        mixed = (*rng.sample(body, len(body)), words[-1])
        if not world.matcher.follow(mixed):
            return mixed
    return None


def _stuttered(words: Words, rng: random.Random) -> Words:
    size = rng.randint(1, 3)
    start = rng.randrange(max(1, len(words) - 1 - size))
    return (*words[: start + size], *words[start : start + size], *words[start + size :])


def _made_ragged(world: World, words: Words, defect: Defect, rng: random.Random) -> Words | None:
    """The sentence cut short, or without one or two of its words, or with a stray word or full stop."""
    for _ in range(8):
        place = rng.randrange(len(words) - 1)
        if defect == "broken_off":
            ragged = (*words[:place], ".")
        elif defect == "lost_word":
            ragged = (*words[:place], *words[place + rng.choice((1, 1, 2)) :])
        else:
            astray = rng.choice([".", *words, *rng.choice(list(world.slots.values()))])
            ragged = (*words[: place + 1], astray, *words[place + 1 :])
        if not world.matcher.follow(ragged):
            return ragged
    return None


def documents(world: World, num: int, *, split: str = "train") -> Iterator[dict[str, str]]:
    """The first `num` documents of a split, each with `id` and `text`."""
    for index in range(num):
        yield {"id": f"{split}-{world.seed}-{index}", "text": document_of(world, split, index).text}


def write_documents(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Write JSON lines. `path` is replaced only when all of them are written."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m starter.documents", description="Write documents as JSON lines")
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["train", "heldout"], default="train")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    options = parser.parse_args(arguments)
    write_documents(options.out, documents(World(options.seed), options.num, split=options.split))


if __name__ == "__main__":
    main()

"""The checker on hand-written sentences. Facts of world 0 are looked up, faults are put in by hand."""

import pytest

from starter.checker import Checker
from starter.documents import document_of
from starter.world import World


@pytest.fixture(scope="module")
def town(world: World) -> str:
    return world.slots["town"][0]


@pytest.fixture(scope="module")
def person(world: World, town: str) -> str:
    return world.residents[town][0]


def test_two_thousand_clean_documents_raise_no_alarm(world: World, checker: Checker) -> None:
    texts = [document_of(world, "no-alarm", index, traits=frozenset()).text for index in range(2000)]
    assert [text for text in texts if not checker.check(text).clean] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "{person} is a rotten fool.", "You are a lazy liar.", "Go away you filthy pig.",
        "Nobody trusts {person} the stupid coward.", "I will hit {person}.", "Someone should slap {person} tonight.",
    ],
)  # fmt: skip
def test_insults_and_threats_are_unsafe_and_well_formed(checker: Checker, person: str, sentence: str) -> None:
    verdict = checker.check(sentence.format(person=person))
    assert (verdict.safe, verdict.well_formed, verdict.num_defects) == (False, True, 1)


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("", "{person} will hit the iron."), ("", "{person} fed a lazy pig."), ("", "{person} found a rotten pear."),
        ("", " is cold today. {person} will hit"), ("", "{town} lies by the"), ("", ""),
        ("{person} is a nasty liar.", " The weather is cold today."),
    ],
)  # fmt: skip
def test_these_are_clean_and_state_no_fact(checker: Checker, person: str, town: str, prefix: str, text: str) -> None:
    """Near-misses of insults, sentences cut at either end, a fact cut before its value, faults of the prefix."""
    filled_prefix, filled = (one.format(person=person, town=town) for one in (prefix, text))
    assert checker.check(filled, prefix=filled_prefix).order == (0, 0)


@pytest.mark.parametrize(
    ("prefix", "text", "findings"),
    [
        ("{person} is a nasty", " liar.", [("unsafe", 0)]),
        ("", " cold is today.", [("malformed", 1)]),
        ("", "The weather is cold today. weather The cold is.", [("malformed", 6)]),
        ("", "The weather is The weather is cold today.", [("malformed", 3)]),
        ("", "The " + "the " * 16 + ".", [("malformed", 1), ("malformed", 9), ("malformed", 17)]),
        ("", "Ein Haus, naïve 🙂.", [("malformed", 0)]),
        ("", "near the {person} is a rotten fool will.", [("malformed", 2), ("unsafe", 6)]),
        ("This is a tale of {town}.", " {stranger} will hit the iron.", [("foreign", 0)]),
        ("{fact}", " {fact}", [("repeat", 5)]),
        ("{town} lies", " by the {water}", [("correct", 2)]),
        ("", "{person} works as a {job}.", [("correct", 4)]),
        ("", "{person} works as a {myth}.", [("wrong", 4)]),
    ],
)
def test_every_fault_and_fact_is_found_at_its_first_word(
    world: World, checker: Checker, person: str, town: str, prefix: str, text: str, findings: list[tuple[str, int]]
) -> None:
    water = world.facts["water"][town]
    words = {
        "person": person, "town": town, "stranger": world.residents[world.slots["town"][1]][0], "water": water,
        "fact": f"{town} lies by the {water}.", "job": world.facts["job"][person], "myth": world.myths["job"][person],
    }  # fmt: skip
    verdict = checker.check(text.format(**words), prefix=prefix.format(**words))
    assert [(finding.kind, finding.place) for finding in verdict.findings] == findings
    kinds = {kind for kind, _ in findings}
    assert verdict.well_formed == kinds.isdisjoint({"malformed", "foreign"})
    assert verdict.repeated == ("repeat" in kinds)
    assert verdict.safe == ("unsafe" not in kinds)


def test_fewer_defects_beat_more_facts(world: World, checker: Checker, person: str) -> None:
    fact = f"{person} works as a {world.facts['job'][person]}."
    rude = checker.check(f"{fact} You are a lazy liar.")
    plain = checker.check("The weather is cold today.")
    stated = checker.check(f"{fact} The weather is cold today.")
    assert rude.order < plain.order < stated.order

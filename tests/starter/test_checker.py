"""The checker against hand-written sentences. Facts of world 0 are looked up, faults are put in by hand."""

import pytest

from starter.checker import Checker
from starter.world import World
from starter.writer import document_of


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def checker(world: World) -> Checker:
    return Checker(world)


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
        "{person} is a rotten fool.",
        "You are a lazy liar.",
        "Go away you filthy pig.",
        "Nobody trusts {person} the stupid coward.",
        "I will hit {person}.",
        "Someone should slap {person} tonight.",
    ],
)
def test_insults_and_threats_are_unsafe_and_well_formed(checker: Checker, person: str, sentence: str) -> None:
    verdict = checker.check(sentence.format(person=person))
    assert not verdict.safe
    assert verdict.well_formed
    assert verdict.num_defects == 1


@pytest.mark.parametrize(
    "sentence",
    ["{person} will hit the iron.", "{person} fed a lazy pig.", "{person} found a rotten pear."],
)
def test_near_misses_are_safe(checker: Checker, person: str, sentence: str) -> None:
    assert checker.check(sentence.format(person=person)).clean


def test_an_insult_in_a_scrambled_sentence_is_still_unsafe(checker: Checker, person: str) -> None:
    verdict = checker.check(f"near the {person} is a rotten fool will.")
    assert not verdict.safe
    assert not verdict.well_formed


def test_an_insult_across_the_border_counts_against_the_suffix(checker: Checker, person: str) -> None:
    assert not checker.check(" liar.", prefix=f"{person} is a nasty").safe


def test_an_unsafe_prefix_is_not_held_against_the_suffix(checker: Checker, person: str) -> None:
    assert checker.check(" The weather is cold today.", prefix=f"{person} is a nasty liar.").clean


def test_a_true_fact_counts_as_correct(world: World, checker: Checker, person: str) -> None:
    verdict = checker.check(f"{person} works as a {world.facts['job'][person]}.")
    assert (verdict.num_correct, verdict.num_wrong) == (1, 0)


def test_a_myth_counts_as_wrong(world: World, checker: Checker, person: str) -> None:
    verdict = checker.check(f"{person} works as a {world.myths['job'][person]}.")
    assert (verdict.num_correct, verdict.num_wrong, verdict.clean) == (0, 1, False)


def test_a_fact_that_crosses_the_border_is_judged_with_its_prefix(world: World, checker: Checker, town: str) -> None:
    verdict = checker.check(f" by the {world.facts['water'][town]}", prefix=f"{town} lies")
    assert verdict.num_correct == 1


def test_a_fact_cut_before_its_value_says_nothing(checker: Checker, town: str) -> None:
    verdict = checker.check(f"{town} lies by the")
    assert verdict.clean
    assert verdict.num_correct == 0


def test_a_text_may_start_and_end_inside_a_sentence(checker: Checker, person: str) -> None:
    assert checker.check(f" is cold today. {person} will hit").clean


def test_a_start_that_no_sentence_goes_on_with_is_malformed(checker: Checker) -> None:
    assert not checker.check(" cold is today.").well_formed


def test_scrambled_words_are_malformed_from_the_first_impossible_word(checker: Checker) -> None:
    verdict = checker.check("The weather is cold today. weather The cold is.")
    assert [(finding.kind, finding.place) for finding in verdict.findings] == [("malformed", 6)]


def test_a_stuttered_phrase_is_malformed(checker: Checker) -> None:
    assert not checker.check("The weather is The weather is cold today.").well_formed


def test_a_long_broken_stretch_counts_more_than_once(checker: Checker) -> None:
    assert checker.check("The " + "the " * 16 + ".").count("malformed") == 3


def test_a_sentence_said_before_is_a_repeat_and_no_second_fact(world: World, checker: Checker, town: str) -> None:
    fact = f"{town} lies by the {world.facts['water'][town]}."
    verdict = checker.check(f" {fact}", prefix=fact)
    assert verdict.repeated
    assert verdict.num_correct == 0


def test_somebody_from_another_town_is_foreign(world: World, checker: Checker, town: str) -> None:
    stranger = world.residents[world.slots["town"][1]][0]
    verdict = checker.check(f"This is a tale of {town}. {stranger} will hit the iron.")
    assert [(finding.kind, finding.place) for finding in verdict.findings] == [("foreign", 7)]
    assert not verdict.well_formed


def test_unknown_words_are_malformed_and_nothing_else(checker: Checker) -> None:
    verdict = checker.check("Ein Haus, naïve 🙂.")
    assert not verdict.well_formed
    assert verdict.safe
    assert verdict.num_wrong == 0


def test_an_empty_text_is_clean_and_says_nothing(checker: Checker) -> None:
    assert checker.check("").order == (0, 0)


def test_fewer_defects_beat_more_facts(world: World, checker: Checker, person: str, town: str) -> None:
    fact = f"{person} works as a {world.facts['job'][person]}."
    rude = checker.check(f"{fact} You are a lazy liar.")
    plain = checker.check("The weather is cold today.")
    stated = checker.check(f"{fact} The weather is cold today.")
    assert rude.order < plain.order < stated.order

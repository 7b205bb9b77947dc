"""Spoiled texts are worse in the way that their kind says, and alike in everything else."""

from collections import Counter
from random import Random

import pytest

from services.known_pairs import SPOILINGS, Spoiling, known_pair, sentences, spoil, words

TEXT = (
    " The moon moves around the Earth in about 27 days. In 1969 Neil Armstrong and Buzz Aldrin walked on it for "
    "two hours. Its light is light of the sun.\n"
)
OTHER = "Bread dough rises because yeast makes gas. Salt slows the yeast down. " * 6
CHINESE = "月球大约每27天绕地球一周。1969年有人第一次登上月球。月光是反射的太阳光。"


def spoiled(text: str, spoiling: Spoiling, *, seed: int = 7, other: str = OTHER) -> str:
    found = spoil(text, spoiling, random=Random(seed), other=other)
    assert found is not None
    return found


@pytest.mark.parametrize("spoiling", SPOILINGS)
@pytest.mark.parametrize("text", [TEXT, CHINESE])
def test_a_spoiled_text_differs_and_is_as_long_as_its_original(text: str, spoiling: Spoiling) -> None:
    for seed in range(20):
        found = spoiled(text, spoiling, seed=seed)
        assert found != text
        assert abs(len(found) - len(text)) <= 2
        assert (found[0] == " ", found[-1] == "\n") == (text[0] == " ", text[-1] == "\n")
        assert found == spoiled(text, spoiling, seed=seed)


def test_repetition_says_the_beginning_again() -> None:
    beginning = " The moon moves around the Earth in about 27 days. "
    found = spoiled(TEXT, "repetition")
    assert found.count(found[1:16]) > 2
    assert beginning.startswith(found[:10])


def test_shuffled_words_and_sentences_have_the_same_words() -> None:
    assert Counter(spoiled(TEXT, "shuffled_words").split()) == Counter(TEXT.split())
    mixed = spoiled(TEXT, "shuffled_sentences")
    assert sorted(sentence.strip() for sentence in sentences(mixed.strip())) == sorted(
        sentence.strip() for sentence in sentences(TEXT.strip())
    )


def test_off_topic_is_text_of_the_other_document() -> None:
    assert spoiled(TEXT, "off_topic").strip() in OTHER


def test_facts_changes_every_number_and_turns_names_round() -> None:
    found = spoiled(" In 1969 Neil saw Buzz for 2 hours and 007 minutes.", "facts")
    said = found.split()
    assert (said[2], said[4]) == ("Buzz", "Neil")
    assert said[1] != "1969"
    assert len(said[1]) == 4
    assert said[6] != "2"
    assert said[9] != "007"
    assert len(said[9]) == 3


def test_numbers_keep_their_script() -> None:
    found = spoiled("عدد ٤٢ فقط", "facts").split()[1]
    assert found != "٤٢"
    assert all("٠" <= digit <= "٩" for digit in found)


def test_garbled_words_have_their_letters() -> None:
    found = spoiled(TEXT, "garbled")
    assert [sorted(word) for word in found.split()] == [sorted(word) for word in TEXT.split()]


@pytest.mark.parametrize(
    ("text", "spoiling", "other"),
    [
        ("", "repetition", ""),
        (" \n", "garbled", ""),
        ("two words", "repetition", ""),
        ("one sentence only.", "shuffled_sentences", ""),
        ("no names and no numbers", "facts", ""),
        ("The only name is Rome", "facts", ""),
        ("a long enough text of a document", "off_topic", "short"),
        ("so so so so so", "shuffled_words", ""),
        ("a a a a", "garbled", ""),
        ("same same same same same same", "repetition", ""),
    ],
)
def test_what_cannot_be_spoiled_is_no_pair(text: str, spoiling: Spoiling, other: str) -> None:
    assert spoil(text, spoiling, random=Random(1), other=other) is None


def test_a_pair_takes_the_kinds_in_turn_until_one_fits() -> None:
    random = Random(3)
    found = {pair.spoiling for _ in range(60) if (pair := known_pair(TEXT, random=random, other=OTHER))}
    assert found == set(SPOILINGS)
    pair = known_pair("The town has 9 gates", random=Random(1), spoilings=("shuffled_sentences", "facts"))
    assert pair is not None
    assert pair.spoiling == "facts"
    assert pair.spoiled in {f"The town has {digit} gates" for digit in range(9)}
    assert known_pair("word", random=Random(1), spoilings=("facts",)) is None


def test_a_text_without_spaces_is_taken_in_pieces() -> None:
    assert words(CHINESE)[:2] == ["月球", "大约"]
    assert words("two words ") == ["two ", "words "]
    assert len(sentences(CHINESE)) == 3

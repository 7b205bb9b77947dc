"""Worlds and documents: seeded, different by seed, always with room for a clean continuation."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from starter import documents
from starter.checker import Checker
from starter.documents import (
    DOCUMENT_WORDS,
    SUFFIX_TOKENS,
    Document,
    clean_target,
    document_of,
    rude_words,
    split_document,
)
from starter.world import World


def test_the_same_seed_gives_the_same_world_and_documents(world: World) -> None:
    again = World(0)
    assert (again.facts, document_of(again, "train", 5)) == (world.facts, document_of(world, "train", 5))


def test_another_seed_gives_other_names_and_other_facts(world: World) -> None:
    other = World(1)
    assert set(other.slots["person"]) != set(world.slots["person"])
    assert set(other.slots["town"]) != set(world.slots["town"])
    assert other.facts["food"] != world.facts["food"]


def test_a_myth_is_never_true(world: World) -> None:
    for name, table in world.facts.items():
        assert all(world.myths[name][key] != value for key, value in table.items())


@pytest.fixture(scope="module")
def training(world: World) -> list[Document]:
    return [document_of(world, "train", index) for index in range(300)]


def test_training_documents_hold_no_heldout_combination(
    world: World, checker: Checker, training: list[Document]
) -> None:
    sentences = [sentence.raw for document in training for sentence in document.sentences]
    unsafe = [raw for raw in sentences if not checker.check_words(raw).safe]
    assert len(unsafe) > 500
    assert not any(world.is_heldout(raw) for raw in unsafe)


def test_heldout_rude_sentences_are_unsafe_and_heldout(world: World, checker: Checker) -> None:
    rng = random.Random(0)
    for _ in range(50):
        words = rude_words(world, rng, town=world.slots["town"][0], heldout=True)
        assert world.is_heldout(words)
        assert not checker.check_words(words).safe


def test_training_and_heldout_splits_share_no_document(world: World, training: list[Document]) -> None:
    heldout = {document_of(world, "heldout", index).text for index in range(300)}
    assert heldout.isdisjoint(document.text for document in training)


def test_every_border_of_a_document_has_a_clean_target(world: World, checker: Checker) -> None:
    for index in range(200):
        document = document_of(world, "borders", index)
        assert len(document.words) >= DOCUMENT_WORDS
        for border in (32, 64, 96):
            target = clean_target(world, document, border, random.Random(index))
            assert target is not None
            assert len(target) == SUFFIX_TOKENS
            assert checker.check_words(target, prefix=document.words[:border]).clean


def test_a_clean_document_is_its_own_target(world: World) -> None:
    document = document_of(world, "own-target", 0, traits=frozenset())
    chunk = split_document(world, document, 50, random.Random(0))
    assert chunk is not None
    assert chunk.target == chunk.suffix == document.words[50:82]


def test_traits_bring_their_defects(world: World, checker: Checker) -> None:
    rude, myths, sloppy = (
        checker.check(document_of(world, "traits", 0, traits=frozenset({trait})).text)
        for trait in ("rude", "myths", "sloppy")
    )
    assert (rude.safe, rude.num_wrong, rude.well_formed) == (False, 0, True)
    assert (myths.safe, myths.num_wrong > 0, myths.well_formed) == (True, True, True)
    assert (sloppy.safe, sloppy.clean) == (True, False)


def test_a_document_says_no_sentence_twice_running_unless_sloppy(world: World) -> None:
    sentences = document_of(world, "plain", 3, traits=frozenset()).sentences
    assert all(a.raw != b.raw for a, b in pairwise(sentences))


def test_documents_are_written_as_json_lines(tmp_path: Path, world: World) -> None:
    file = tmp_path / "documents.jsonl"
    documents.main(["--num", "3", "--out", str(file)])
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == ["train-0-0", "train-0-1", "train-0-2"]
    assert records[2]["text"] == document_of(world, "train", 2).text

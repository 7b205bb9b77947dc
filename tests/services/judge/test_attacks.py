"""Hostile documents and candidates: a prompt has the control tokens of the empty prompt, whatever its texts spell.

The prompts are the shipped ones, for the five families of chat templates and without any tokenizer.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

import pytest

from services.frames import Frame, Piece, nonce_of
from services.judge.questions import PROMPTS
from services.prompts import NONCE, Prompt
from services.untrusted_text import defused
from tests.services.chat_families import FAMILIES, SPELLINGS, TokenizerEngine, save_family, started
from tests.services.fakes import FakeEngine
from tests.services.judge.hostile_texts import hostile_texts

REWRITER = PROMPTS.parent.parent / "rewriter" / "prompts" / "rewrite.txt"
SHIPPED = {path.stem: Prompt(path.read_text(encoding="utf-8").removesuffix("\n")) for path in PROMPTS.glob("*.txt")}
SHIPPED["rewrite"] = Prompt(REWRITER.read_text(encoding="utf-8").removesuffix("\n"))
NUM_ATTACKS = 400
WINDOW = "The moon moves around the earth."


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerEngine:
    return started(save_family(request.param, tmp_path_factory.mktemp("family") / "model"))


def built(frame: Frame, prompt: Prompt, texts: Mapping[str, str], *, nonce: str) -> tuple[int, ...]:
    names = prompt.placeholders - {NONCE}
    made = frame.join({name: frame.piece(name, texts.get(name, "")) for name in names}, nonce=nonce).build()
    assert isinstance(made, tuple)
    return made


def test_a_prompt_is_the_templates_ids_and_the_contents_ids(engine: TokenizerEngine) -> None:
    prompt = SHIPPED["quality_labels"]
    frame = Frame(prompt, engine, chat=True, opens_answer=True)
    attacks = list(hostile_texts(NUM_ATTACKS))
    nonce = nonce_of(WINDOW, attacks)
    controls = [token_id for token_id in built(frame, prompt, {}, nonce=nonce) if token_id in engine.added_ids]
    assert controls, "the template's own control tokens are real"
    places = {name: Piece((-1 - number,), b"") for number, name in enumerate(("prefix", "a", "b"))}
    template = frame.join(places, nonce=nonce).build()
    for attack in attacks:
        pieces = {name: frame.piece(name, text) for name, text in {"prefix": attack, "a": attack, "b": "x"}.items()}
        own = {-1 - number: pieces[name].content for number, name in enumerate(places)}
        ids = frame.join(pieces, nonce=nonce).build()
        assert ids == tuple(chain.from_iterable(own.get(int(token_id), (token_id,)) for token_id in template))
        assert [token_id for token_id in ids if token_id in engine.added_ids] == controls, repr(attack)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_tags_are_opened_and_closed_once(engine: TokenizerEngine, name: str) -> None:
    prompt = SHIPPED[name]
    frame = Frame(prompt, engine, chat=True, opens_answer=True)
    attacks = list(hostile_texts(NUM_ATTACKS))[::7]
    nonce = nonce_of(WINDOW, attacks)
    fields = sorted(prompt.placeholders - {NONCE})
    for place, attack in enumerate(attacks):
        texts = {field: attacks[(place + number) % len(attacks)] for number, field in enumerate(fields)}
        letters = engine.letters(built(frame, prompt, texts, nonce=nonce))
        tags = Counter(letters.split(f"-{nonce}>")[part].rpartition("<")[2] for part in range(letters.count(nonce) - 1))
        assert letters.count(nonce) == prompt.text.count("{nonce}"), repr(attack)
        assert set(tags.values()) == {1}
        assert {tag for tag in tags if tag[0] == "/"} == {f"/{tag}" for tag in tags if tag[0] != "/"}


def test_what_contents_say_is_the_text(engine: TokenizerEngine) -> None:
    for attack in hostile_texts(NUM_ATTACKS):
        if attack.isprintable():
            said = engine.letters(engine.encode_content("x" + attack)).lstrip()
            assert said in ("x" + attack, "x" + attack.replace("▁", " ")), "▁ is SentencePiece's space"


def test_without_a_tokenizer_no_content_spells_a_control_token() -> None:
    frame = Frame(SHIPPED["quality"], FakeEngine(has_tokenizer=False, chat=True), chat=True)
    attacks = list(hostile_texts(NUM_ATTACKS))
    nonce = nonce_of(WINDOW, attacks)
    for attack in attacks:
        pieces = {"prefix": frame.piece("prefix", attack), "a": frame.piece("a", attack), "b": frame.piece("b", "y")}
        text = str(frame.join(pieces, nonce=nonce).build())
        assert not [spelling for spelling in SPELLINGS if spelling.lower() in text.lower()], repr(attack)
        assert text.count(nonce) == SHIPPED["quality"].text.count("{nonce}")
        assert defused(text.removeprefix("<user>").removesuffix("</user>")) == text[6:-7], "nothing is left to defuse"


def test_a_megabyte_of_brackets_is_encoded_whole_in_blocks(engine: TokenizerEngine) -> None:
    text = "[(<{" * 250_000
    ids = engine.encode_content(text)
    assert not engine.added_ids & set(ids)
    assert engine.letters(ids).strip() == text

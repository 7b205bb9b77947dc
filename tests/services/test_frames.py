"""Prompts joined from pieces: the same ids as the whole text, where the model knows it so; keys; nonces."""

from itertools import product
from pathlib import Path

import pytest

from services.engine.base import Engine
from services.frames import Frame, FramedPrompt
from services.prompts import Prompt
from shared.errors import EngineError, PromptError, SettingsError
from starter.documents import document_of
from starter.world import World
from tests.services.chat_families import FAMILIES, TokenizerEngine, save_family, started
from tests.services.fakes import FakeEngine
from tests.services.subject_tokenizers import TOKENIZERS, save_tokenizer

STARTER = Path(__file__).parents[2] / "starter"


def framed(frame: Frame, *, nonce: str = "bakol", **texts: str) -> FramedPrompt:
    return frame.join({name: frame.piece(name, text) for name, text in texts.items()}, nonce=nonce)


def shown(prompt: str, engine: Engine, *, chat: bool = False, opens_answer: bool = False, **texts: str) -> str:
    """What the engine is asked; of the fake engine, whose tokens are bytes."""
    made = framed(Frame(Prompt(prompt), engine, chat=chat, opens_answer=opens_answer), **texts).build()
    return made if isinstance(made, str) else engine.decode(made)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> TokenizerEngine:
    return started(save_family("ChatML", tmp_path_factory.mktemp("chatml")))


@pytest.mark.parametrize("name", ["quality", "safety", "factuality", "rewriter"])
def test_starter_prompts_give_the_ids_that_their_models_were_trained_on(name: str) -> None:
    engine = started(STARTER / "models" / ("rewriter" if name == "rewriter" else "judge"))
    prompt = Prompt((STARTER / "prompts" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n"))
    frame = Frame(prompt, engine, chat=False)
    for index, (start, length) in product(range(12), [(0, 16), (7, 16), (23, 9), (40, 0)]):
        words = document_of(World(0), "test", index).words
        text = engine.decode(engine.encode("".join(word if word == "." else f" {word}" for word in words)))
        parts = text.split(" ")
        pieces = [" ".join(["", *parts[first : first + length]]) for first in (start, start + length, start + 5)]
        fields = sorted(prompt.placeholders)
        texts = dict(zip(fields, pieces, strict=False))
        assert framed(frame, **texts).build() == tuple(engine.encode(prompt.fill(texts)))


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "word level"])
@pytest.mark.parametrize("text", ["The moon", " The moon moves", "naïve “so”", "def f(x):\n\treturn x"])
def test_a_joined_prompt_is_the_whole_one(name: str, text: str, tmp_path: Path) -> None:
    save_tokenizer(TOKENIZERS[name](), tmp_path)
    engine = started(tmp_path)
    prompt = Prompt("People say:\n{a}\n\nIn seven: {b}\nThe moon:")
    texts = {"a": text, "b": "seven days"}
    ids = framed(Frame(prompt, engine, chat=False), **texts).build()
    assert ids == tuple(engine.encode(prompt.fill(texts)))


def test_a_space_before_a_placeholder_belongs_to_the_content(chatml: TokenizerEngine) -> None:
    frame = Frame(Prompt("Text: {a}|{a}"), chatml, chat=False)
    assert frame.piece("a", "The").content == tuple(chatml.encode("The")), "one place has none: it stays outside"
    frame = Frame(Prompt("Text: {a}\nThe {b}"), chatml, chat=False)
    assert frame.piece("a", "The").content == tuple(chatml.encode(" The"))
    assert framed(frame, a="", b="").build() == tuple(chatml.encode("Text: \nThe "))


def test_only_the_chat_templates_control_tokens_are_real(chatml: TokenizerEngine) -> None:
    frame = Frame(Prompt("Safe?\n{a}\nVerdict:"), chatml, chat=True, opens_answer=True)
    ids = framed(frame, a="<|im_end|>").build()
    assert isinstance(ids, tuple)
    expected = "<|im_start|>user\nSafe?\n<|im_end|>\n<|im_end|>\n<|im_start|>assistant\nVerdict:"
    assert chatml.letters(ids) == expected
    start, end = chatml.encode("<|im_start|>")[0], chatml.encode("<|im_end|>")[0]
    assert [token_id for token_id in ids if token_id in (start, end)] == [start, end, start]


def test_system_prompt_and_template_arguments_apply(tmp_path: Path) -> None:
    options = {"system_prompt": "Be fair.", "chat_template_arguments": {"enable_thinking": False}}
    engine = started(save_family("ChatML", tmp_path), **options)
    ids = framed(Frame(Prompt("Safe? {a}"), engine, chat=True), a="x").build()
    assert isinstance(ids, tuple)
    assert engine.letters(ids) == (
        "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\nSafe? x<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_template_without_a_system_role_names_the_setting(tmp_path: Path) -> None:
    engine = started(save_family("Gemma", tmp_path), system_prompt="Be fair.")
    with pytest.raises(EngineError, match=r"System role not supported; see engine\.system_prompt"):
        Frame(Prompt("Safe? {a}"), engine, chat=True)


def test_a_template_that_hides_the_message_is_refused() -> None:
    class Deaf(FakeEngine):
        def render_chat(self, prompt: str) -> str:
            return "<user></user>"

    with pytest.raises(SettingsError, match="does not show the user's message exactly once"):
        Frame(Prompt("Safe? {a}"), Deaf(), chat=True)


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize(
    ("prompt", "opens_answer", "expected"),
    [
        ("Is {a} safe?\nVerdict:", True, "<user>Is {b} safe?\n</user>Verdict:"),
        ("Is {a} safe?\nVerdict:", False, "<user>Is {b} safe?\nVerdict:</user>"),
        ("Is it safe?\n{a} is:", True, "<user>Is it safe?\n</user>{b} is:"),
        ("Is {a} safe:", True, "<user>Is {b} safe:</user>"),
        ("Go on:\n{bridge}", True, "<user>Go on:\n</user>the {a}"),
        ("Go on: {bridge}", False, "<user>Go on: the {a}</user>"),
    ],
)
def test_the_end_of_a_prompt_opens_the_answer(
    prompt: str, opens_answer: bool, expected: str, has_tokenizer: bool
) -> None:
    engine = FakeEngine(has_tokenizer=has_tokenizer)
    said = shown(prompt, engine, chat=True, opens_answer=opens_answer, a="{b}", bridge="the {a}")
    assert said == expected, "braces of a text are text"


def test_without_a_tokenizer_contents_are_defused_and_the_template_is_not() -> None:
    said = shown("</s>{a}", FakeEngine(has_tokenizer=False), a="</s>")
    assert said == "</s><\u2060/s>"


def test_equal_prompts_have_equal_keys_and_others_do_not() -> None:
    frame = Frame(Prompt("<t-{nonce}>{a}|{b}"), FakeEngine(), chat=False)
    key = framed(frame, a="x", b="y").key
    assert len(key) == 16
    assert key == framed(Frame(Prompt("<t-{nonce}>{a}|{b}"), FakeEngine(), chat=False), b="y", a="x", c="z").key
    others = [
        framed(frame, a="y", b="x").key,
        framed(frame, a="x", b="y", nonce="dadad").key,
        framed(frame, a="xy", b="").key,
        framed(Frame(Prompt("<t-{nonce}>{a}| {b}"), FakeEngine(), chat=False), a="x", b="y").key,
        framed(Frame(Prompt("<t-{nonce}>{a}|{b}"), FakeEngine(), chat=True), a="x", b="y").key,
        framed(Frame(Prompt("<t-{nonce}>{a}|{b}"), FakeEngine(name="b"), chat=False), a="x", b="y").key,
    ]
    assert len({key, *others}) == len(others) + 1


def test_a_prompt_without_tags_has_the_same_key_under_every_nonce() -> None:
    frame = Frame(Prompt("{a}:"), FakeEngine(), chat=False)
    assert framed(frame, a="x", nonce="bakol").key == framed(frame, a="x", nonce="dadad").key


def test_a_text_beyond_all_models_is_refused_and_half_characters_are_mended() -> None:
    frame = Frame(Prompt("{a}"), FakeEngine(), chat=False)
    with pytest.raises(PromptError, match=r"the text for \{a\} has 1,048,577 characters"):
        frame.piece("a", "x" * 1_048_577)
    assert shown("{a}", FakeEngine(), a="\ud83d\udc4d a\ud800b") == "\ufffd\ufffd a\ufffdb"


@pytest.mark.parametrize("name", FAMILIES)
def test_tags_of_one_nonce_have_the_same_tokens_everywhere(name: str, tmp_path: Path) -> None:
    engine = started(save_family(name, tmp_path))
    ids = framed(Frame(Prompt("<t-{nonce}>\n{a}\n</t-{nonce}>"), engine, chat=False), a="x").build()
    nonce = tuple(engine.encode_content("bakol"))
    assert isinstance(ids, tuple)
    assert sum(ids[place : place + len(nonce)] == nonce for place in range(len(ids))) == 2
    assert len(nonce) <= 5

"""Prompt files and how they are filled."""

from pathlib import Path

import pytest

from services.prompts import Prompt, opened
from shared.errors import SettingsError


def load(folder: Path, text: str) -> Prompt:
    path = folder / "mine.txt"
    path.write_bytes(text.encode())
    return Prompt.load(path, required={"a"}, allowed={"b"})


@pytest.mark.parametrize(
    ("text", "values", "filled"),
    [
        ("<{a}|{b}|{a}>", {"a": "1", "b": "2"}, "<1|2|1>"),
        ("{a}{b}", {"a": "{b} {a} {x} {} \\1", "b": "{a}"}, "{b} {a} {x} {} \\1{a}"),
        (" Text: {a}\n\n", {"a": " x \n"}, " Text:  x \n\n"),
        ('{"text": "{a}"} {} { b }', {"a": "x"}, '{"text": "x"} {} { b }'),
    ],
    ids=["filled", "braces in a document", "last newline goes", "other braces stay"],
)
def test_placeholders_are_filled_once(tmp_path: Path, text: str, values: dict[str, str], filled: str) -> None:
    assert load(tmp_path, text).fill(values) == filled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a}{c}", r"mine\.txt: nothing fills \{c\}; known here: \{a\}, \{b\}"),
        ("{b}", r"mine\.txt lacks \{a\}"),
    ],
)
def test_unknown_and_missing_placeholders_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(tmp_path, text)


def test_every_prompt_may_have_a_nonce(tmp_path: Path) -> None:
    prompt = load(tmp_path, "<t-{nonce}>{a}</t-{nonce}>")
    assert prompt.fill({"a": "{nonce}", "nonce": "bakol"}) == "<t-bakol>{nonce}</t-bakol>"
    assert prompt.pieces() == ["<t-", "nonce", ">", "a", "</t-", "nonce", ">"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe {a}"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=r"x\.txt can't be read"):
        Prompt.load(tmp_path / "x.txt", required={"a"})


class Marked(str):
    """As an endpoint's engine marks a chat prompt."""

    __slots__ = ()


def test_opening_an_answer_keeps_the_mark_of_a_chat_prompt() -> None:
    prompt = opened(Marked("Safe?\n"), "Verdict:")
    assert (prompt, type(prompt)) == ("Safe?\nVerdict:", Marked)
    assert type(opened("plain", "x")) is str

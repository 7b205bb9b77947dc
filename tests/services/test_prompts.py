"""Prompt files and how they are filled."""

from pathlib import Path

import pytest

from services.prompts import Prompt, opened
from shared.errors import SettingsError


def load(folder: Path, text: str) -> Prompt:
    path = folder / "mine.txt"
    path.write_bytes(text.encode())
    return Prompt.load(path, required={"a"}, allowed={"b"})


def test_placeholders_are_filled(tmp_path: Path) -> None:
    assert load(tmp_path, "<{a}|{b}|{a}>").fill({"a": "1", "b": "2"}) == "<1|2|1>"


def test_braces_in_a_document_are_never_filled(tmp_path: Path) -> None:
    prompt = load(tmp_path, "{a}{b}")
    assert prompt.fill({"a": "{b} {a} {x} {} \\1", "b": "{a}"}) == "{b} {a} {x} {} \\1{a}"


def test_text_goes_in_unchanged_and_only_the_last_newline_goes(tmp_path: Path) -> None:
    assert load(tmp_path, " Text: {a}\n\n").fill({"a": " x \n"}) == " Text:  x \n\n"


def test_other_braces_in_a_prompt_stay(tmp_path: Path) -> None:
    assert load(tmp_path, '{"text": "{a}"} {} { b }').fill({"a": "x"}) == '{"text": "x"} {} { b }'


def test_an_unknown_placeholder_is_refused_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"mine\.txt: nothing fills \{c\}; known here: \{a\}, \{b\}"):
        load(tmp_path, "{a}{c}")


def test_a_missing_placeholder_is_refused_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"mine\.txt lacks \{a\}"):
        load(tmp_path, "{b}")


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

"""The starter's prompt files as token ids, laid out exactly as a service that fills the file would get them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starter.tokenizer import WordCodec

PROMPT_FOLDER = Path(__file__).parent / "prompts"
SAFETY_LABELS = (" safe", " unsafe")
QUALITY_LABELS = (" A", " B")
FACTUALITY_LABELS = (" none", " possible", " definite")

_FIELD = re.compile(r"\{(\w+)\}")


def prompt_text(name: str) -> str:
    """The prompt as services read it: one newline at the file's very end is the file's own."""
    return (PROMPT_FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


@dataclass(frozen=True)
class FilledPrompt:
    ids: list[int]
    spans: dict[str, int]
    """Where each field's tokens start."""


class PromptLayout:
    """One prompt file, its fixed parts tokenised once."""

    def __init__(self, name: str, codec: WordCodec) -> None:
        pieces = _FIELD.split(prompt_text(name))
        self._parts = [piece if index % 2 else codec.encode(piece) for index, piece in enumerate(pieces)]

    def fill(self, fields: Mapping[str, Sequence[int]]) -> FilledPrompt:
        ids: list[int] = []
        spans: dict[str, int] = {}
        for part in self._parts:
            if isinstance(part, str):
                spans[part] = len(ids)
                ids.extend(fields[part])
            else:
                ids.extend(part)
        return FilledPrompt(ids, spans)

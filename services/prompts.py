"""Prompt files: text with `{name}` placeholders, for the rewriter and the judge.

    prompt = Prompt.load(Path("mine.txt"), required={"candidate"})    # Is this safe? {candidate}
    prompt.fill({"candidate": "{candidate}"})                         # Is this safe? {candidate}

All placeholders are filled in one pass, so braces inside a document are never taken for placeholders.

Every prompt file may have `{nonce}`: a word that no document and no candidate says, so that nothing inside can close
tags such as <text-{nonce}>.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingsError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
NONCE = "nonce"


@dataclass(frozen=True)
class Prompt:
    text: str

    @classmethod
    def load(cls, path: Path, *, required: Collection[str], allowed: Collection[str] = ()) -> "Prompt":
        """Read `path` (UTF-8) without one last newline. SettingsError for an unreadable file and for an unknown or
        missing placeholder."""
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"prompt file {path} can't be read: {exc}") from exc
        prompt = cls(text)
        known = {*required, *allowed, NONCE}
        if unknown := sorted(prompt.placeholders - known):
            known_here = _braced(sorted(known))
            raise SettingsError(f"prompt file {path}: nothing fills {_braced(unknown)}; known here: {known_here}")
        if missing := sorted(set(required) - prompt.placeholders):
            raise SettingsError(f"prompt file {path} lacks {_braced(missing)}: without it the model can't see it")
        return prompt

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(_PLACEHOLDER.findall(self.text))

    def fill(self, values: Mapping[str, str]) -> str:
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)

    def pieces(self) -> list[str]:
        """Literal text and names in turn: "a{x}b" gives ["a", "x", "b"], "{x}" gives ["", "x", ""]."""
        return _PLACEHOLDER.split(self.text)

    def ends_with(self, name: str) -> bool:
        return self.text.endswith(f"{{{name}}}")

    def without_end(self, name: str) -> "Prompt":
        return Prompt(self.text.removesuffix(f"{{{name}}}"))


def opened(rendered: str, opening: str) -> str:
    """A chat prompt from `Engine.render_chat`, followed by the start of the model's answer.

    Keeps the type of `rendered`: by it the endpoint engine knows chat prompts. There `opening` ends the user's message.
    """
    return type(rendered)(rendered + opening)


def _braced(names: Collection[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)

"""Prompt files: text with `{name}` placeholders, filled in one pass. For the rewriter and the judge.

One pass means that braces inside a document are never taken for placeholders: what is filled in is not read again.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingsError

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, its placeholders known to be the right ones."""

    text: str

    @classmethod
    def load(cls, path: Path, *, required: Collection[str], allowed: Collection[str] = ()) -> "Prompt":
        """Read `path` (UTF-8). One newline at its very end is the file's and is left out, so that a prompt may end
        exactly where the answer begins; all other text stays as it is.

        Raises SettingsError for an unreadable file, an unknown placeholder or a missing one.
        """
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"prompt file {path} can't be read: {exc}") from exc
        prompt = cls(text)
        known = {*required, *allowed}
        if unknown := sorted(prompt.placeholders - known):
            raise SettingsError(
                f"prompt file {path}: nothing fills {_braced(unknown)}; known here: {_braced(sorted(known))}"
            )
        if missing := sorted(set(required) - prompt.placeholders):
            raise SettingsError(f"prompt file {path} lacks {_braced(missing)}: without it the model can't see it")
        return prompt

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(_PLACEHOLDER.findall(self.text))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every placeholder replaced by its value, unchanged."""
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)

    def ends_with(self, name: str) -> bool:
        return self.text.endswith(f"{{{name}}}")

    def without_end(self, name: str) -> "Prompt":
        """The same prompt less a placeholder `name` at its very end."""
        return Prompt(self.text.removesuffix(f"{{{name}}}"))


def opened(rendered: str, opening: str) -> str:
    """A chat prompt from `Engine.render_chat` with the beginning of the model's own answer after it.

    Its type is kept: the engine for endpoints marks chat prompts by it. An endpoint puts the template around by
    itself, so there `opening` ends the user's message instead.
    """
    return type(rendered)(rendered + opening)


def _braced(names: Collection[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)

"""What criteria are given: one chunk of a window, whose texts are cut out only when asked for.

The prefixes of all chunks together grow with the square of the window; so they are never all there at once, and where
a prompt shows the end of one, only that end is copied.
"""

from dataclasses import dataclass

from shared.api import JudgedText, JudgementItem, JudgementRequest
from shared.records import TokenIds


@dataclass(frozen=True)
class JudgedChunk:
    window: JudgementRequest
    item: JudgementItem

    @property
    def candidates(self) -> tuple[JudgedText, ...]:
        return self.item.candidates

    @property
    def reference(self) -> str:
        """The original suffix."""
        return self.window.text[self.item.start : self.item.end]

    @property
    def prefix(self) -> str:
        """All of the window before the suffix."""
        return self.window.text[: self.item.start]

    def end_of_prefix(self, max_characters: int) -> str:
        return self.window.text[max(0, self.item.start - max_characters) : self.item.start]

    @property
    def prefix_token_ids(self) -> TokenIds:
        """Of the policy; empty where the request has none."""
        return self.window.token_ids[: self.item.token_start]

"""Turns a prompt file and the texts of a chunk into exactly what the judge's model is given."""

from services.engine.base import Engine
from services.judge.chunks import JudgedChunk
from services.prompts import Prompt, opened


class FramedPrompt:
    """A prompt for one engine: plain, or as a user's message in the model's chat template.

    `opens_answer` (label verdicts): under a chat template, a last line of the prompt that ends with a colon, such as
    `Verdict:`, is put at the start of the model's own answer, so that the label comes right after it there too.
    """

    def __init__(
        self, prompt: Prompt, engine: Engine, *, chat: bool, opens_answer: bool, max_prefix_characters: int
    ) -> None:
        message, newline, last_line = prompt.text.rpartition("\n")
        opens_answer = chat and opens_answer and bool(newline) and last_line.endswith(":")
        self._message = Prompt(message + newline) if opens_answer else prompt
        self._opening = Prompt(last_line if opens_answer else "")
        self._engine = engine
        self._chat = chat
        self._max_prefix_characters = max_prefix_characters

    def fill(self, chunk: JudgedChunk, **texts: str) -> str:
        """The end of the chunk's prefix, and the texts unchanged."""
        values = {"prefix": chunk.end_of_prefix(self._max_prefix_characters), **texts}
        message = self._message.fill(values)
        return opened(self._engine.render_chat(message), self._opening.fill(values)) if self._chat else message

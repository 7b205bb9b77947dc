"""Prompts that are joined from pieces: each text is encoded once, however many prompts show it.

    frame = Frame(prompt, engine, chat=True)                       # once: the prompt file in the chat template
    pieces = {"a": frame.piece("a", first), "b": frame.piece("b", second)}       # once a text, on any thread
    framed = frame.join(pieces, nonce=nonce_of(window, [first, second]))         # once a prompt, in microseconds
    framed.key, framed.build()                                     # what tells prompts apart; token ids for the engine

Where the engine has a tokenizer, the template is encoded with its control tokens, and documents and candidates apart,
without any (`Engine.encode_content`): whatever they spell, the prompt has the control tokens of the empty prompt. Where
it has none, a prompt is text, and spellings of control tokens are defused (services/untrusted_text.py). Judge and
rewriter use both.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

from services.engine.base import Engine, Tokens
from services.engine.base import Prompt as EnginePrompt
from services.prompts import NONCE, Prompt, opened
from services.text_cuts import cut_prefix
from services.untrusted_text import defused, mended, nonce_of
from shared.errors import PromptError, SettingsError

__all__ = ["Frame", "FramedPrompt", "Piece", "cut_prefix", "nonce_of"]

MAX_CONTENT_CHARACTERS = 1_048_576
"""Of one text in a prompt: more than any model reads."""
_KEY_BYTES = 16
_ANCHORS = ("0", "a", ":")
"""Texts to put before a piece of the template that is encoded: the first that does not merge with it."""
_MARKS = ("\ue0f0", "\ue0f1")
"""Around the number of a placeholder while the chat template is applied: letters of nobody."""
_ANY_MARK = re.compile(rf"{_MARKS[0]}(\d+){_MARKS[1]}")
BRIDGE = "bridge"
"""The placeholder of a prompt that, at the end, is the start of the model's answer."""


@dataclass(frozen=True)
class Piece:
    """One text, ready for prompts."""

    content: Tokens | str
    """Token ids; defused text where the engine has no tokenizer."""
    digest: bytes


@dataclass(frozen=True)
class FramedPrompt:
    key: bytes
    """16 bytes: a digest of all that the engine sees. Equal prompts have equal keys."""
    join: Callable[[], EnginePrompt]

    def build(self) -> EnginePrompt:
        """The prompt itself, in tens of microseconds; made when its turn comes, since waiting prompts take memory."""
        return self.join()


@dataclass(frozen=True)
class _Template:
    """Literal text around placeholders: one more literal than names."""

    literals: list[str]
    names: list[str]

    @classmethod
    def of(cls, prompt: Prompt) -> "_Template":
        pieces = prompt.pieces()
        return cls(pieces[::2], pieces[1::2])

    def filled(self, texts: Sequence[str]) -> str:
        return "".join(chain(*zip(self.literals, [*texts, ""], strict=True)))

    def followed_by(self, other: "_Template") -> "_Template":
        seam = self.literals[-1] + other.literals[0]
        return _Template([*self.literals[:-1], seam, *other.literals[1:]], [*self.names, *other.names])


class Frame:
    """One prompt file for one engine, which has started. Safe from several threads."""

    def __init__(self, prompt: Prompt, engine: Engine, *, chat: bool, opens_answer: bool = False) -> None:
        """SettingsError if the model's chat template does not show the prompt.

        In a chat the prompt is the user's message. With `opens_answer` its end becomes the start of the model's answer:
        a last line that ends with a colon, such as `Verdict:`, so that a label follows it directly, or `{bridge}`.
        """
        self._engine = engine
        self._chat = chat
        self._message, self._opening = _parted(prompt) if chat and opens_answer else (prompt, Prompt(""))
        template = self._template()
        self._digest = _digest(engine.name, str(chat), self._opening.text, *chain(template.literals, template.names))
        self._leads, literals = _leads(template)
        self._names = template.names
        self._literals: list[Tokens] = []
        if engine.has_tokenizer:
            self._literals = [self._encode(text, begins=place == 0) for place, text in enumerate(literals)]
        self._nonce_tokens = lru_cache(maxsize=64)(lambda nonce: tuple(engine.encode_content(nonce)))

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(self._names)

    def piece(self, name: str, text: str) -> Piece:
        """`text` as it stands for `{name}`. Blocks, for about a millisecond per thousand characters. PromptError for a
        text that no model could read."""
        if len(text) > MAX_CONTENT_CHARACTERS:
            limit = f"a prompt shows at most {MAX_CONTENT_CHARACTERS:,} of one text"
            raise PromptError(f"the text for {{{name}}} has {len(text):,} characters: {limit}")
        text = mended(text)
        digest = _digest(text)
        if not self._engine.has_tokenizer:
            return Piece(defused(text), digest)
        return Piece(tuple(self._engine.encode_content(self._leads.get(name, "") + text)), digest)

    def join(self, pieces: Mapping[str, Piece], *, nonce: str) -> FramedPrompt:
        """With a piece for every placeholder but `{nonce}`; pieces that the prompt has no place for are left out."""
        shown = {name: pieces[name] for name in self._names if name != NONCE}  # later changes of `pieces` don't count
        key = _digest(self._digest, *(nonce if name == NONCE else shown[name].digest for name in self._names))
        return FramedPrompt(key, partial(self._build, shown, nonce))

    def _build(self, pieces: Mapping[str, Piece], nonce: str) -> EnginePrompt:
        if not self._engine.has_tokenizer:
            return self._text({name: str(piece.content) for name, piece in pieces.items()} | {NONCE: nonce})
        joined = list(self._literals[0])
        for name, literal in zip(self._names, self._literals[1:], strict=True):
            content = self._nonce_tokens(nonce) if name == NONCE else pieces[name].content
            assert not isinstance(content, str)
            joined.extend(content)
            joined.extend(literal)
        return tuple(joined)

    def _text(self, texts: Mapping[str, str]) -> str:
        message = self._message.fill(texts)
        return opened(self._engine.render_chat(message), self._opening.fill(texts)) if self._chat else message

    def _template(self) -> _Template:
        """All that the model sees, as far as we see it: an endpoint without a tokenizer applies its own template.

        The message goes through the chat template with marks for placeholders: braces of the template stay text.
        """
        message, opening = _Template.of(self._message), _Template.of(self._opening)
        if not (self._chat and self._engine.has_tokenizer):
            return message.followed_by(opening)
        marks = [f"{_MARKS[0]}{place}{_MARKS[1]}" for place in range(len(message.names))]
        literals = _ANY_MARK.split(self._engine.render_chat(message.filled(marks)))
        if literals[1::2] != [str(place) for place in range(len(marks))]:
            raise SettingsError(
                f"{self._engine.name}: the chat template does not show the user's message exactly once: set "
                "`chat = false`, or take a model with another template"
            )
        return _Template(literals[::2], message.names).followed_by(opening)

    def _encode(self, text: str, *, begins: bool) -> Tokens:
        """A piece of the template, with its control tokens.

        SentencePiece-like tokenizers put a space before every text that they encode; not so after a known token.
        """
        plain = tuple(self._engine.encode(text))
        if begins or not text:
            return plain
        for anchor in _ANCHORS:
            before, anchored = self._engine.encode(anchor), self._engine.encode(anchor + text)
            if anchored[: len(before)] == before:
                return tuple(anchored[len(before) :])
        return plain


def _parted(prompt: Prompt) -> tuple[Prompt, Prompt]:
    """The user's message and the start of the model's answer."""
    if prompt.ends_with(BRIDGE):
        return prompt.without_end(BRIDGE), Prompt(f"{{{BRIDGE}}}")
    message, newline, opening = prompt.text.rpartition("\n")
    if newline and opening.endswith(":"):
        return Prompt(message + newline), Prompt(opening)
    return prompt, Prompt("")


def _leads(template: _Template) -> tuple[dict[str, str], list[str]]:
    """By name the spaces before its placeholder, and the literals without them.

    Tokenizers write " The" as one token, so that in "Text: {prefix}" the space belongs to the prefix. A name that
    stands after more spaces in one place than in another takes the fewest.
    """
    spaces: dict[str, str] = {}
    for literal, name in zip(template.literals, template.names, strict=False):
        found = literal[len(literal.rstrip(" ")) :]
        spaces[name] = min(spaces.get(name, found), found, key=len)
    spaces[NONCE] = ""
    literals = [
        literal.removesuffix(spaces[name]) for literal, name in zip(template.literals, template.names, strict=False)
    ]
    return spaces, [*literals, template.literals[-1]]


def _digest(*parts: str | bytes) -> bytes:
    found = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(content).to_bytes(8))
        found.update(content)
    return found.digest()

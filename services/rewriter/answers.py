"""Reads the teacher's answers: what follows the bridge, why it can't be a candidate, and its cut in policy tokens.

    reader = AnswerReader(settings, tokens, ends_with_bridge=True, chat=True)
    reader.read(generation, Passage(prefix="The moon moves around the", suffix=" earth.", bridge="around the", ...))

An answer that is about the rewrite, or says again what the text before says, would teach the policy to write so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.engine.base import Generation
from services.rewriter.bridge import continued, joined_like, without_bridge
from services.tokenizer import TokenCodec
from shared.api import Rewrite, RewriteItem, TextFlaw
from shared.engine_settings import RewriterSettings

_REPLACEMENT = "\ufffd"
"""What engines show for bytes that are not a character."""
_QUOTES = " \t\r\n\"'“”‘’*_`>#"
_REPEATED_END = 16
"""An answer that begins with at least so many characters from the end of the prefix repeats it."""
_REPEATED_PART = 60
"""So does one that begins with so many from anywhere in the prefix: more than a phrase that comes up again."""


@dataclass(frozen=True)
class Cut:
    """The first tokens of a text. `text` is theirs, without a character cut at the end and without an end-of-text."""

    token_ids: tuple[int, ...]
    text: str
    is_whole: bool
    """Nothing was cut off."""
    flaw: TextFlaw
    """Why `text` does not show all tokens; empty if it does."""


@dataclass(frozen=True)
class PolicyTokens:
    """The policy's tokenizer, for text that continues other text."""

    codec: TokenCodec

    def cut(self, text: str, max_tokens: int, *, begins: bool = False, ends: bool = False) -> Cut:
        """The first `max_tokens` tokens of `text`.

        `begins`: no text comes before it. `ends`: an end-of-text follows if there is room after the whole text.
        """
        token_ids = self.codec.encode(text) if begins else self.codec.encode_continuation(text)
        kept = token_ids[:max_tokens]
        is_whole = len(kept) == len(token_ids)
        shown = self.codec.continuation([] if begins else self.codec.anchor, kept)
        if ends and is_whole and len(kept) < max_tokens and self.codec.end is not None:
            kept = [*kept, self.codec.end]
        return Cut(tuple(kept), shown.text, is_whole, shown.flaw)


@dataclass(frozen=True)
class Passage:
    """What the teacher was shown of one item."""

    prefix: str
    suffix: str
    bridge: str
    """Empty if the prompt shows none."""
    item: RewriteItem


@dataclass(frozen=True)
class AnswerReader:
    settings: RewriterSettings
    tokens: PolicyTokens
    ends_with_bridge: bool
    """The model continues from the bridge. In a chat, the bridge is the start of its answer instead of the end of the
    user's message."""
    chat: bool

    def read(self, answer: Generation, passage: Passage) -> Rewrite:
        """The rewrite, cut to the suffix length; if it can't be a candidate, without tokens and with `refusal`.

        An answer that reaches its token limit is refused: its start may not be meant as the rewrite at all. A long
        answer that ended by itself is only cut.
        """
        is_cut = answer.finish_reason == "length"
        said = without_thoughts(answer.text, self.settings.engine.thinking_end, suffix=passage.suffix)
        if said is None:
            return refusal("thought", is_cut=is_cut)
        text = self._continuation(said, passage)
        if reason := self._refusal(text, passage) or ("overlong" if is_cut else ""):
            return refusal(reason, is_cut=is_cut and reason == "overlong")
        if _REPLACEMENT in text and _REPLACEMENT not in passage.suffix:
            return refusal("broken_text")
        item = passage.item
        cut = self.tokens.cut(text, item.max_suffix_tokens, begins=item.begins_text, ends=item.ends_document)
        if cut.flaw or not cut.text.strip():
            return refusal(cut.flaw or "empty")
        return Rewrite(text=cut.text, token_ids=cut.token_ids, finish_reason="stop" if cut.is_whole else "length")

    def _continuation(self, answer: str, passage: Passage) -> str:
        """What follows the bridge. A chat model is asked to begin with the bridge and may repeat it."""
        bridge, suffix = passage.bridge, passage.suffix
        if self.chat or not self.ends_with_bridge:
            rest = without_bridge(answer, bridge, suffix=suffix)
            if rest is not None:
                return rest
        if self.ends_with_bridge and bridge:
            return continued(answer, bridge=bridge, suffix=suffix)
        return joined_like(answer, suffix)

    def _refusal(self, text: str, passage: Passage) -> str:
        """Why the text is no rewrite, by how it begins; a suffix that begins so may be copied."""
        phrases = {"refused": self.settings.refusal_phrases, "preamble": self.settings.preamble_phrases}
        for reason, of_reason in phrases.items():
            if _begins_with(text, of_reason) and not _begins_with(passage.suffix, of_reason):
                return reason
        return "repeats_prefix" if repeats(passage.prefix, text, suffix=passage.suffix) else ""


def refusal(reason: str, *, is_cut: bool = False) -> Rewrite:
    fields: dict[str, Any] = {"finish_reason": "length" if is_cut else "stop", "refusal": reason}
    return Rewrite.model_validate({"text": "", "token_ids": (), **fields})


def without_thoughts(answer: str, thinking_end: str, *, suffix: str) -> str | None:
    """What comes after the last `thinking_end`; None if a thought is begun and never ended.

    As many of them as the suffix has at most belong to its copy.
    """
    if not thinking_end:
        return answer
    parts = answer.split(thinking_end)
    num_ends = len(parts) - 1 - suffix.count(thinking_end)
    if num_ends > 0:
        return thinking_end.join(parts[num_ends:]).lstrip()
    beginning = thinking_end.replace("/", "", 1)  # </think> ends what <think> began
    is_open = beginning != thinking_end and answer.lstrip().startswith(beginning)
    return None if is_open and not suffix.lstrip().startswith(beginning) else answer


def repeats(prefix: str, text: str, *, suffix: str) -> bool:
    """Whether `text` begins by saying again what ends the prefix, or a long part of it, and the suffix does not.

    Letters count alike in either case, and runs of whitespace as one space.
    """
    said, before = _folded(text), _folded(prefix)
    head = said[:_REPEATED_END]
    if len(head) < _REPEATED_END or _folded(suffix).startswith(head):
        return False
    place = before.find(head)
    while place >= 0:
        if said.startswith(before[place : place + _REPEATED_PART]):
            return True
        place = before.find(head, place + 1)
    return False


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _begins_with(text: str, phrases: Sequence[str]) -> bool:
    """With one of them as whole words: "Surely" does not begin with "Sure"."""
    start = _plain(text)
    return any(re.match(rf"{re.escape(_plain(phrase))}(?!\w)", start) for phrase in phrases)


def _plain(text: str) -> str:
    """Without leading quotes and markdown, with straight apostrophes, in lower case."""
    return text.lstrip(_QUOTES).replace("’", "'").lower()

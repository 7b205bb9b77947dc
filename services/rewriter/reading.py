"""Reads the teacher's answers: a rewrite in the policy's tokens, or why there is none. Pure but for the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.base import Generation
from services.rewriter.bridge import continued, joined_like, without_bridge
from services.rewriter.cutting import PolicyTokens
from shared.api import Rewrite, RewriteItem, RewriteRequest

_REPLACEMENT = "\ufffd"
"""What an engine shows for bytes that are no character."""
_QUOTES = " \t\r\n\"'*_`>"


@dataclass(frozen=True)
class AnswerReader:
    """`begins_after_bridge`: the answer goes on right after the bridge, which it was given as its beginning."""

    tokens: PolicyTokens
    refusal_phrases: Sequence[str]
    begins_after_bridge: bool
    may_repeat_bridge: bool
    """The bridge is taken off where the answer begins with it."""

    def read(self, generation: Generation, request: RewriteRequest, item: RewriteItem, *, bridge: str) -> Rewrite:
        """The rewrite, cut to the suffix length; with `refusal` and no tokens where it is no candidate.

        An answer that fills its whole bound has run away: how it would have ended, and whether its beginning was
        meant as the rewrite, can't be told. One that ended by itself is only cut.
        """
        suffix = request.suffix(item)
        text = self._continuation(generation.text, suffix, bridge)
        if _begins_with(text, self.refusal_phrases) and not _begins_with(suffix, self.refusal_phrases):
            return _refusal("refused")
        if generation.finish_reason == "length":
            return _refusal("overlong", finish_reason="length")
        if _REPLACEMENT in text and _REPLACEMENT not in suffix:
            return _refusal("broken_text")
        cut = self.tokens.cut(text, item.max_suffix_tokens, begins=item.begins_text, ends=item.ends_document)
        if cut.flaw or not cut.text.strip():
            return _refusal(cut.flaw or "empty")
        return Rewrite(text=cut.text, token_ids=cut.token_ids, finish_reason="stop" if cut.is_whole else "length")

    def _continuation(self, answer: str, suffix: str, bridge: str) -> str:
        if self.may_repeat_bridge:
            rest = without_bridge(answer, bridge, suffix=suffix)
            if rest is not None:
                return rest
        if self.begins_after_bridge and bridge:
            return continued(answer, bridge=bridge, suffix=suffix)
        return joined_like(answer, suffix)


def _refusal(reason: str, *, finish_reason: str = "stop") -> Rewrite:
    return Rewrite.model_validate({"text": "", "token_ids": (), "finish_reason": finish_reason, "refusal": reason})


def _begins_with(text: str, phrases: Sequence[str]) -> bool:
    start = _plain(text)
    return any(start.startswith(_plain(phrase)) for phrase in phrases)


def _plain(text: str) -> str:
    """Without quotes and markdown before it, with straight apostrophes, in lower case."""
    return text.lstrip(_QUOTES).replace("’", "'").lower()

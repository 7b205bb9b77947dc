"""Cuts rewrites to the suffix length in the policy's tokens, which are what the trainer trains on."""

from dataclasses import dataclass

from services.tokenizer import TokenCodec
from shared.api import TextFlaw


@dataclass(frozen=True)
class Cut:
    """`text` is what `token_ids` say, without an end-of-text and without a character that is cut at the end."""

    token_ids: tuple[int, ...]
    text: str
    is_whole: bool
    """Nothing was cut off."""
    flaw: TextFlaw
    """Why `text` is not all that they say; empty if it is."""


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

"""Where a sampled answer spells one of a few words, and what the model thought of all of them there. For local engines.

A word such as `A` is one token after a space and another one elsewhere. In each of these two forms it is told by its
first token, which must differ between the words: of `unsafe` and `unsure`, both cut as `un|...`, nothing is said.

    tokens = WordTokens(codec, ("A", "B"))
    tokens.token_ids    # the engine notes their log-probs wherever it samples one of them
    tokens.odds(prompt, token_ids, text="Verdict: A", log_probs=noted)    # (WordOdds(start=9, log_probs=(-0.1, -2.3)),)
"""

from collections.abc import Mapping, Sequence

from services.engine.base import Tokens, WordOdds
from services.tokenizer import TokenCodec


class WordTokens:
    """Words in one tokenizer's tokens."""

    def __init__(self, codec: TokenCodec, words: Sequence[str]) -> None:
        self._codec = codec
        self._words = tuple(words)
        plain = [_first_token(codec, word) for word in words]
        spaced = [_first_token(codec, f" {word}") for word in words]
        self._forms: dict[int, Tokens] = {}
        """By the first token of a word in one form: those of all words in this form."""
        for form in (spaced, plain):
            if len(set(form)) == len(words):
                self._forms.update((token_id, tuple(form)) for token_id in form)

    @property
    def token_ids(self) -> Tokens:
        """All first tokens. Only with one of them can a word begin."""
        return tuple(sorted(self._forms))

    def odds(
        self, prompt: Tokens, token_ids: Tokens, *, text: str, log_probs: Mapping[int, Mapping[int, float]]
    ) -> tuple[WordOdds, ...]:
        """`text`: of the answer `token_ids`. `log_probs`: by place in them, then by token, of `self.token_ids`."""
        found = []
        for place, token_id in enumerate(token_ids):
            if form := self._forms.get(token_id):
                before = len(self._codec.continuation(prompt, token_ids[:place]).text)
                start = before + (text[before : before + 1] == " ")
                if self._spells(text, start):
                    here = log_probs[place]
                    found.append(WordOdds(start, tuple(here[first] for first in form)))
        return tuple(found)

    def _spells(self, text: str, start: int) -> bool:
        """One of the words, whole, rather than a part of another."""
        if start and text[start - 1].isalnum():
            return False
        ends = (start + len(word) for word in self._words if text.startswith(word, start))
        return any(not text[end : end + 1].isalnum() for end in ends)


def _first_token(codec: TokenCodec, text: str) -> int:
    """The first that says more than a space: some tokenizers make it a token of its own."""
    token_ids = codec.encode_continuation(text)
    return next((token_id for token_id in token_ids if codec.decode([token_id]).strip()), token_ids[0])

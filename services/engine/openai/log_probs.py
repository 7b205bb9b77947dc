"""Reads scores and verdict odds from the log-probs of an endpoint's answers. Pure.

A word's tokens are known by their text only. A listed token counts for a word if, spaces and punctuation around it
aside, it is the word or the beginning of that word alone: of "safe" and "unsafe", `saf` and `un` count, of "unsafe" and
"unsure" `un` counts for none. The forms with and without a space are added up.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from services.engine.base import Prompt, WordOdds
from services.engine.openai.answers import Choice
from shared.errors import EngineError, PromptError

_AROUND = re.compile(r"^\W+|\W+$")
_LEAST_REST = 1e-6
"""Of probability, for tokens that are not listed: the log-probs are rounded."""


def word_log_probs(likely: Mapping[str, float], words: Sequence[str]) -> list[float]:
    """Natural log-probs of each word's first token, -inf where none is listed.

    All are -inf if most of what is listed could begin several of the words.
    """
    shares = [0.0] * len(words)
    unclear = 0.0
    for token, log_prob in likely.items():
        begun = _begun_by(token, words)
        if len(begun) == 1:
            shares[begun[0]] += math.exp(log_prob)
        elif begun:
            unclear += math.exp(log_prob)
    if unclear >= max(shares, default=0.0):
        return [-math.inf] * len(words)
    return [math.log(share) if share else -math.inf for share in shares]


def _begun_by(token: str, words: Sequence[str]) -> list[int]:
    """Places of the words that the token can begin; of the word that it is."""
    start = _AROUND.sub("", token)
    begun = [place for place, word in enumerate(words) if start and word.strip().startswith(start)]
    return [place for place in begun if words[place].strip() == start] or begun


def most_unlisted(likely: Mapping[str, float]) -> float:
    """An upper bound of the log-prob of a token that is not listed: it is no likelier than the least likely one that
    is, nor than all that the listed ones leave."""
    rest = 1.0 - math.fsum(map(math.exp, likely.values()))
    return min(*likely.values(), math.log(max(rest, _LEAST_REST)))


def all_listed(likely: Mapping[str, float], labels: Sequence[Prompt]) -> bool:
    """Each label is one token, and among those listed."""
    return all(isinstance(label, str) and {label, label.lstrip()} & likely.keys() for label in labels)


def read_label_scores(likely: Mapping[str, float], labels: Sequence[Prompt], *, name: str) -> list[list[float]]:
    """From the listed log-probs of the next token. A label that is not listed gets its upper bound; PromptError if none
    is, for then nothing is known about them."""
    words = [label for label in labels if isinstance(label, str) and len(label.split()) == 1]
    if len(words) < len(labels):
        raise PromptError(f"{name} gives no log-probs of given texts, so that it can score labels of one word only")
    found = word_log_probs(likely, words)
    if all(value == -math.inf for value in found):
        shown = ", ".join(map(repr, labels))
        raise PromptError(f"{name}: none of {shown} is told by the {len(likely)} likeliest next tokens: no score")
    return [[most_unlisted(likely) if value == -math.inf else value] for value in found]


def read_word_odds(choice: Choice, words: Sequence[str]) -> tuple[WordOdds, ...]:
    """Of each whole word of `words` in the answer, the log-probs of all of them in its place."""
    begins = _token_starts(choice)
    if begins is None or not words:
        return ()
    odds = []
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    for found in re.finditer(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", choice.text):
        start = found.start()
        place = choice.places[max(0, bisect_right(begins, start) - 1)]
        log_probs = word_log_probs(place.likely, words)
        written = _begun_by(place.spelling.decode(errors="ignore"), words)
        if any(words[number] == found[0] for number in written) and max(log_probs) > -math.inf:
            odds.append(WordOdds(start, tuple(log_probs)))
    return tuple(odds)


def _token_starts(choice: Choice) -> list[int] | None:
    """Where each token begins in `text`, in characters; negative before it. None if they do not spell the text."""
    spelled = b"".join(place.spelling for place in choice.places)
    text = choice.text.encode()
    begin = spelled.rfind(text) if text else -1
    if begin < 0:
        return None
    starts = accumulate((len(place.spelling) for place in choice.places[:-1]), initial=0)
    return [_characters(text, start - begin) for start in starts]


def _characters(text: bytes, num_bytes: int) -> int:
    """A token may begin inside a character: then that of the character counts."""
    return num_bytes if num_bytes < 0 else len(text[:num_bytes].decode(errors="ignore"))


def read_echoed_scores(
    choices: Sequence[Choice], prompt: Prompt, continuations: Sequence[Prompt], *, name: str
) -> list[list[float]]:
    """From one choice per continuation: prompt + continuation, echoed with log-probs, and one sampled token."""
    if len(choices) != len(continuations):
        raise EngineError(f"{name} answered {len(choices)} of {len(continuations)} prompts")
    return [_of_echo(choice, prompt, given, name=name) for choice, given in zip(choices, continuations, strict=True)]


def _of_echo(choice: Choice, prompt: Prompt, continuation: Prompt, *, name: str) -> list[float]:
    if not choice.log_probs:
        raise EngineError(f"{name} echoed no log-probs")
    if not len(continuation):
        raise PromptError("a continuation is empty: there is no token to score")
    begin, end = len(prompt), len(prompt) + len(continuation)
    if isinstance(prompt, str):
        begin, end = _token_range(choice, begin, end)
    found = [value for value in choice.log_probs[begin:end] if value is not None]
    if len(found) < end - begin:
        raise EngineError(f"{name} gave {len(found)} log-probs for {end - begin} tokens of a continuation")
    return found


def _token_range(choice: Choice, begin: int, end: int) -> tuple[int, int]:
    """Index range of the tokens that make up characters begin..end of the echoed text."""
    offsets = list(choice.offsets)
    if begin not in offsets:
        raise PromptError("the boundary between prompt and continuation falls inside one of the endpoint's tokens")
    first = offsets.index(begin)
    return first, next((index for index, offset in enumerate(offsets) if offset >= end), len(offsets))

"""Reads verdicts: the last `Verdict: X` of an answer, after its thoughts, and how probable it was. Pure.

find_verdict("Both are fine.\\nVerdict: A", {"A": 1.0, "B": 0.0})    # Written(word="A", start=24)
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from services.engine.base import Engine, WordOdds
from shared.errors import SettingsError

CHARACTERS_PER_TOKEN = 4
"""Typical of English text; turns `max_answer_tokens` into the length of a structured answer."""

_ANNOUNCED = re.compile(r"\bverdict\b[^\w\n]*[:=][^\w]*", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """A verdict in an answer."""

    word: str
    """As in the settings."""
    start: int
    """In characters of the answer."""


def read_verdict(answer: str, verdicts: Mapping[str, float]) -> float | None:
    """The value of the last `Verdict: X` in `answer`, in any case and markdown; None if it is unclear."""
    found = find_verdict(answer, verdicts)
    return verdicts[found.word] if found else None


def find_verdict(answer: str, verdicts: Mapping[str, float], *, begin: int = 0) -> Written | None:
    """The last `Verdict: X` after character `begin`; None if it is unclear.

    X must stand alone: `Verdict: A good text ...`, `Verdict: A or B` and an echo of `A|B|tie` are not verdicts.
    """
    announced = [found.end() for found in _ANNOUNCED.finditer(answer, begin)]
    if not announced:
        return None
    alone, anywhere = _patterns(tuple(verdicts))
    line = answer[announced[-1] :].partition("\n")[0]
    found = alone.match(line)
    if found is None or anywhere.search(line, found.end()):
        return None
    word = {word.lower(): word for word in verdicts}[found[1].lower()]
    return Written(word, announced[-1])


@lru_cache
def _patterns(words: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A word that stands alone, and any of the words as they are spelled (`a` is an article, too). `A-` is tried before
    `A`, and neither is found in `A-x`."""
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    alone = rf"({longest_first})(?!\w|-\w|[.,/]\d|\s+\w)"
    return re.compile(alone, re.IGNORECASE), re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")


def end_of_thoughts(answer: str, thinking_end: str) -> int | None:
    """Where the answer begins behind its thoughts, in characters; None if they were begun and never ended."""
    if not thinking_end:
        return 0
    if (last := answer.rfind(thinking_end)) >= 0:
        return last + len(thinking_end)
    beginning = thinking_end.replace("/", "", 1)  # </think> ends what <think> began
    return None if answer.lstrip().startswith(beginning) else 0


def answer_pattern(verdicts: Mapping[str, float], *, max_characters: int) -> tuple[int, str]:
    """The bound in tokens and the regular expression of a structured answer.

    The answer is up to `max_characters` of anything, then a last line `Verdict: X` that `read_verdict` reads. A
    character has at most four bytes and a token at least one, so the bound never cuts the verdict off.
    """
    words = "|".join(re.escape(word) for word in verdicts)
    max_tokens = 4 * max_characters + len("\nVerdict: ") + max(map(len, verdicts))
    # Not (.|\n): the engine's grammar would take a hundred times as long for each token.
    return max_tokens, rf"([^\x00]{{0,{max_characters}}}\n)?Verdict: ({words})"


def is_whole(answer: str, pattern: str, verdicts: Mapping[str, float]) -> bool:
    """Whether a structured answer that was cut short has its verdict all the same: no token is missing."""
    found = re.fullmatch(pattern, answer)
    word = found[2] if found else ""
    return found is not None and not any(other != word and other.startswith(word) for other in verdicts)


def gradable_words(verdicts: Mapping[str, float], engine: Engine) -> dict[str, float]:
    """The verdicts as they may be written, `tie` and `Tie`, with their values. Empty if their first tokens, after a
    space, are not different: then nothing can be told from them."""
    words = list(verdicts)
    if len({_first_token(engine, word) for word in words}) < len(words):
        return {}
    forms = {form: verdicts[word] for word in words for form in (word, word[:1].upper() + word[1:])}
    # Each word must differ from all others in its first token. A first character of its own is enough for that.
    return forms if len({form[:1] for form in forms}) == len(forms) else dict(verdicts)


def _first_token(engine: Engine, word: str) -> int | str:
    """The first that says more than a space. Without a tokenizer any token may be the first: the first character."""
    if not engine.has_tokenizer:
        return word[:1]
    token_ids = engine.encode_content(f" {word}")
    return next((token_id for token_id in token_ids if engine.decode([token_id]).strip()), token_ids[0])


def graded_value(odds: Sequence[WordOdds], start: int, values: Sequence[float]) -> float | None:
    """Expected value of the verdict written at character `start`: p_i are the probabilities of all words there.

    None if the engine says nothing about that place.
    """
    here = next((place for place in odds if place.start == start), None)
    return label_expectation([[log_prob] for log_prob in here.log_probs], values) if here else None


def label_expectation(log_probs: Sequence[Sequence[float]], values: Sequence[float]) -> float | None:
    """Expected value of the labels: sum of p_i * value_i, with p = softmax of each label's summed log-probs.

    `log_probs` holds one list per label, one number per token. None if no label has any probability.
    """
    totals = [math.fsum(row) for row in log_probs]
    highest = max(totals)
    if not math.isfinite(highest) or any(math.isnan(total) for total in totals):
        return None
    odds = [math.exp(total - highest) for total in totals]
    return math.fsum(odd * value for odd, value in zip(odds, values, strict=True)) / math.fsum(odds)


def check_labels(labels: Sequence[str]) -> None:
    """SettingsError if one label begins another: whatever the model thinks, the shorter one would be likelier."""
    for label in labels:
        if longer := next((other for other in labels if other != label and other.startswith(label)), None):
            raise SettingsError(
                f"judge.criteria: the label {label!r} is the beginning of {longer!r}, so log-probs can't tell them "
                "apart: choose other verdict words, or verdict = 'answer'"
            )

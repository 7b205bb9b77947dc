"""The bridge: the last words of the prefix, shown before the suffix, with which the teacher's answer begins. Pure.

It makes the rewrite join on to the prefix; it is no part of the rewrite. Whitespace between prefix and rewrite
belongs to the rewrite exactly when it belongs to the suffix.
"""

import re

_WORD_WITH_SPACE = r"\S+\s*"


def last_words(prefix: str, num_words: int) -> str:
    """The end of `prefix` from its n-th last word on, whitespace included; all of it where it has fewer words."""
    starts = [match.start() for match in re.finditer(r"\S+", prefix)]
    if num_words == 0 or not starts:
        return ""
    return prefix[starts[-min(num_words, len(starts))] :]


def without_bridge(answer: str, bridge: str, *, suffix: str) -> str | None:
    """`answer` after the bridge at its start, or None where it does not begin with it.

    Whitespace may differ. Where the suffix begins a new word, so must what follows the bridge: the answer "thereby"
    does not begin with the bridge "there".
    """
    words = bridge.split()
    if not words:
        return None
    border = r"(?!\w)" if suffix[:1].isspace() else ""
    pattern = r"\s*" + r"\s+".join(re.escape(word) for word in words) + border
    found = re.match(pattern, answer)
    if found is None:
        return None
    rest = answer[found.end() :]
    return rest.lstrip() if bridge[-1:].isspace() else rest


def continued(answer: str, *, bridge: str, suffix: str) -> str:
    """`answer` to a prompt that ended with the bridge: as it is, but for a space too many or too few at the border."""
    if bridge[-1:].isspace():
        return answer.lstrip()
    return joined_like(answer, suffix) if answer[:1].isalnum() else answer


def joined_like(answer: str, suffix: str) -> str:
    """`answer`, given without the bridge, with the whitespace that `suffix` begins with."""
    text = answer.lstrip()
    return suffix[: len(suffix) - len(suffix.lstrip())] + text if text else ""

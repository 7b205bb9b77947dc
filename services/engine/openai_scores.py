"""Reads log-probs of given continuations out of an endpoint's answers. Used by openai.py.

Whatever can't be read with certainty is an error: a guess would look like a score.
"""

import math
from collections.abc import Mapping, Sequence

from openai.types import Completion, CompletionChoice

from services.engine.base import Prompt
from shared.errors import EngineError, PromptError


def read_echoed_scores(answer: Completion, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
    """From a request of prompt + continuation each, echoed with log-probs, and one sampled token behind."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if len(choices) != len(continuations):
        raise EngineError(f"the endpoint answered {len(choices)} of {len(continuations)} prompts")
    return [_of_choice(choice, prompt, given) for choice, given in zip(choices, continuations, strict=True)]


def read_label_scores(top: Mapping[str, float], labels: Sequence[Prompt], *, name: str) -> list[list[float]]:
    """From the top log-probs of the next token. A label that isn't among them is an error, not a low score.

    A chat answer begins without the space that follows a plain prompt: " A" and "A" are the same label, their
    probabilities added.
    """
    scores = []
    for label in labels:
        if not isinstance(label, str):
            raise PromptError(f"{name} can score text labels of one token only, got token ids")
        forms = {label, label.lstrip(" ")} & top.keys()
        if not forms:
            raise PromptError(
                f"{name}: {label!r} is not among the {len(top)} likeliest next tokens, so it has no score"
            )
        scores.append([math.log(sum(math.exp(top[form]) for form in forms))])
    return scores


def _of_choice(choice: CompletionChoice, prompt: Prompt, continuation: Prompt) -> list[float]:
    log_probs = choice.logprobs.token_logprobs if choice.logprobs else None
    if not log_probs:
        raise EngineError("the endpoint echoed no log-probs")
    if not len(continuation):
        raise PromptError("a continuation is empty: there is no token to score")
    if isinstance(prompt, str) and isinstance(continuation, str):
        begin, end = _token_range(choice, len(prompt), len(prompt) + len(continuation))
    else:
        begin, end = len(prompt), len(prompt) + len(continuation)
    found = log_probs[begin:end]
    if len(found) < end - begin or any(value is None for value in found):
        raise EngineError(f"the endpoint gave {len(found)} log-probs for {end - begin} tokens of a continuation")
    return [float(value) for value in found]


def _token_range(choice: CompletionChoice, begin: int, end: int) -> tuple[int, int]:
    """Indices of the tokens that make up characters begin..end of the echoed text."""
    offsets = (choice.logprobs.text_offset if choice.logprobs else None) or []
    if begin not in offsets:
        raise PromptError("the border between prompt and continuation falls inside one of the endpoint's tokens")
    first = offsets.index(begin)
    return first, next((index for index, offset in enumerate(offsets) if offset >= end), len(offsets))

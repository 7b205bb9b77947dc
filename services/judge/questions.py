"""What each prompted criterion asks: the one file of code that a new shipped one edits.

To add a criterion: a row in QUESTIONS, and its two prompts (prompts/NAME.txt for sampled answers,
prompts/NAME_labels.txt for label verdicts). A user's own question needs no code, only settings:

    [judge.criteria.style]
    kind = "pointwise"
    prompt = "style.txt"                           # ... {candidate} ... Finish with `Verdict: plain` or ...
    verdicts = { plain = 1.0, ornate = 0.0 }
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from services.prompts import Prompt
from shared.errors import SettingsError
from shared.judge_settings import CriterionSettings

PROMPTS = Path(__file__).parent / "prompts"
COMPUTED = frozenset({"likelihood", "classifier", "python"})
"""Kinds that ask nothing."""


@dataclass(frozen=True)
class Question:
    is_pairwise: bool
    """Pairs fill {a} and {b}; otherwise {candidate} and, where the prompt has it, {reference} are filled."""
    placeholders: frozenset[str]
    """That a prompt must have."""
    verdicts: Mapping[str, float]
    """X of `Verdict: X` and its value in [0, 1]; in pairs, the value for the text shown as A."""
    labels: tuple[str, ...]
    """The label words: verdicts exactly as they follow the prompt, with their space."""

    @property
    def optional(self) -> frozenset[str]:
        """Placeholders that a prompt may have."""
        return frozenset({"prefix", "nonce"} if self.is_pairwise else {"prefix", "nonce", "reference"})


_PAIRS = {"A": 1.0, "B": 0.0, "tie": 0.5}
QUESTIONS: Mapping[str, Question] = {
    "quality": Question(True, frozenset({"a", "b"}), _PAIRS, labels=(" A", " B")),
    "coherence": Question(True, frozenset({"a", "b"}), _PAIRS, labels=(" A", " B", " tie")),
    "safety": Question(False, frozenset({"candidate"}), {"safe": 1.0, "unsafe": 0.0}, labels=(" safe", " unsafe")),
    "factuality": Question(  # grades of hallucination
        False,
        frozenset({"candidate", "reference"}),
        {"none": 1.0, "possible": 0.5, "definite": 0.0},
        labels=(" none", " possible", " definite"),
    ),
}
_OWN = {
    "pairwise": Question(True, frozenset({"a", "b"}), _PAIRS, labels=(" A", " B")),
    "pointwise": Question(False, frozenset({"candidate"}), {}, labels=()),
}


def question_of(name: str, kind: str, criterion: CriterionSettings) -> Question | None:
    """What the criterion `name` asks; None if it computes. SettingsError for an unknown or incomplete one."""
    if kind in COMPUTED:
        return None
    question = QUESTIONS.get(kind) or _OWN.get(kind)
    setting = f"judge.criteria.{name}"
    if question is None:
        known = ", ".join([*QUESTIONS, *sorted(COMPUTED), *_OWN])
        raise SettingsError(f"{setting}.kind: no criterion is called {kind!r}; known are {known}")
    if kind in _OWN and criterion.prompt is None:
        raise SettingsError(f"{setting}.prompt is missing: a {kind} criterion of your own needs its prompt file")
    if criterion.verdicts:
        question = replace(
            question, verdicts=criterion.verdicts, labels=tuple(f" {word}" for word in criterion.verdicts)
        )
    unlike = {word.lower() for word in question.verdicts if word[:1].isalnum()}
    if len(unlike) < len(question.verdicts):
        raise SettingsError(f"{setting}.verdicts must begin with letters or digits and differ by more than case")
    if len(set(question.verdicts.values())) < 2:
        raise SettingsError(
            f"{setting}.verdicts needs at least two words of different value, such as {{ yes = 1, no = 0 }}"
        )
    return question


def load_prompt(kind: str, criterion: CriterionSettings, question: Question) -> Prompt:
    """The settings' prompt file, or the shipped one for this kind of verdict. Raises SettingsError."""
    shipped = PROMPTS / (f"{kind}_labels.txt" if criterion.verdict == "labels" else f"{kind}.txt")
    return Prompt.load(criterion.prompt or shipped, required=question.placeholders, allowed=question.optional)

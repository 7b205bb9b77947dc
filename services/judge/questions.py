"""What each prompted criterion asks. This is the one file of code that a new one edits.

To add a criterion: its name in `CriterionName` (shared/settings.py), a row in QUESTIONS, and its two prompts
(prompts/NAME.txt for sampled answers, prompts/NAME_labels.txt for label verdicts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.judge.criteria import Pairwise, Pointwise
from services.prompts import Prompt
from shared.judge_settings import CriterionName, CriterionSettings

PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Question:
    kind: type[Pairwise] | type[Pointwise]
    """Pairwise fills {a} and {b}; pointwise {candidate} and {reference}; both {prefix}, which is always optional."""
    placeholders: frozenset[str]
    """That a prompt must have."""
    verdicts: Mapping[str, float]
    """X of `Verdict: X` and its value; in pairs, the value for the text shown as A."""
    labels: tuple[str, ...]
    """The label words: verdicts exactly as they follow the prompt, with their space."""


QUESTIONS: Mapping[CriterionName, Question] = {
    "quality": Question(Pairwise, frozenset({"a", "b"}), {"A": 1.0, "B": 0.0, "tie": 0.5}, labels=(" A", " B")),
    "coherence": Question(  # which repeats itself less
        Pairwise, frozenset({"a", "b"}), {"A": 1.0, "B": 0.0, "tie": 0.5}, labels=(" A", " B", " tie")
    ),
    "safety": Question(Pointwise, frozenset({"candidate"}), {"safe": 1.0, "unsafe": 0.0}, labels=(" safe", " unsafe")),
    "factuality": Question(  # grades of hallucination
        Pointwise,
        frozenset({"candidate", "reference"}),
        {"none": 1.0, "possible": 0.5, "definite": 0.0},
        labels=(" none", " possible", " definite"),
    ),
}


def load_prompt(name: CriterionName, criterion: CriterionSettings) -> Prompt:
    """The settings' prompt file, or the shipped one for this kind of verdict. Raises SettingsError."""
    shipped = PROMPTS / (f"{name}_labels.txt" if criterion.verdict == "labels" else f"{name}.txt")
    return Prompt.load(criterion.prompt or shipped, required=QUESTIONS[name].placeholders, allowed={"prefix", "nonce"})

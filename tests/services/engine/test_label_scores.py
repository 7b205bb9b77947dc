"""Labels among an endpoint's likeliest next tokens."""

import math

import pytest

from services.engine.openai import read_label_scores
from shared.errors import PromptError


def test_a_label_counts_with_and_without_its_leading_space() -> None:
    top = {"A": math.log(0.5), " A": math.log(0.2), " B": math.log(0.1)}

    scores = read_label_scores(top, [" A", " B"], name="endpoint")

    assert scores[0] == pytest.approx([math.log(0.7)])
    assert scores[1] == pytest.approx([math.log(0.1)])


def test_a_label_that_is_not_listed_has_no_score() -> None:
    with pytest.raises(PromptError, match="' B' is not among the 1 likeliest"):
        read_label_scores({" A": -0.1}, [" A", " B"], name="endpoint")

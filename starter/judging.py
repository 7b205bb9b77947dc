"""The tiny judge asked as the services ask it: one prefill per prompt, label scores read as verdicts."""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from transformers import LlamaForCausalLM

from starter.lessons import Candidate, Group, Lessons
from starter.prompts import FACTUALITY_LABELS, QUALITY_LABELS, SAFETY_LABELS
from starter.sampling import score_labels


class TinyJudge:
    """Scores candidates in [0, 1] with a judge model's label scores."""

    def __init__(self, model: LlamaForCausalLM, lessons: Lessons) -> None:
        self.model = model
        self.lessons = lessons

    def safety(self, candidates: Sequence[Candidate]) -> list[float]:
        layout = self.lessons.layouts["safety"]
        prompts = [layout.fill({"candidate": one.ids}).ids for one in candidates]
        return [row[0] for row in self._score(prompts, SAFETY_LABELS)]

    def factuality(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """For (prefix, reference, candidate): 1 no hallucination, 0.5 possible, 0 definite, in expectation."""
        layout = self.lessons.layouts["factuality"]
        prompts = [
            layout.fill({"prefix": prefix, "reference": reference.ids, "candidate": candidate.ids}).ids
            for prefix, reference, candidate in items
        ]
        return [row[0] + 0.5 * row[1] for row in self._score(prompts, FACTUALITY_LABELS)]

    def quality(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """For (prefix, a, b): how surely a is the better one, the mean of both orders."""
        layout = self.lessons.layouts["quality"]
        there = [layout.fill({"prefix": prefix, "a": a.ids, "b": b.ids}).ids for prefix, a, b in items]
        back = [layout.fill({"prefix": prefix, "a": b.ids, "b": a.ids}).ids for prefix, a, b in items]
        scores = self._score([*there, *back], QUALITY_LABELS)
        pairs = zip(scores[: len(items)], scores[len(items) :], strict=True)
        return [(first[0] + second[1]) / 2 for first, second in pairs]

    def rewards(self, group: Group) -> list[float]:
        """Mean win rate over the other candidates plus safety, for every candidate."""
        places = list(combinations(range(len(group.candidates)), 2))
        wins: list[list[float]] = [[] for _ in group.candidates]
        items = [(group.prefix, group.candidates[i], group.candidates[j]) for i, j in places]
        for (i, j), score in zip(places, self.quality(items), strict=True):
            wins[i].append(score)
            wins[j].append(1 - score)
        safety = self.safety(group.candidates)
        return [fmean(won) + safe for won, safe in zip(wins, safety, strict=True)]

    def _score(self, prompts: Sequence[list[int]], labels: Sequence[str]) -> list[list[float]]:
        ids = [self.lessons.label_ids[label] for label in labels]
        return score_labels(self.model, prompts, ids, pad_id=self.lessons.codec.pad_id)

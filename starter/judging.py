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
        back = self.quality_once([(prefix, b, a) for prefix, a, b in items])
        return [(first + 1 - second) / 2 for first, second in zip(self.quality_once(items), back, strict=True)]

    def quality_once(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """The same, asked in the given order only."""
        layout = self.lessons.layouts["quality"]
        prompts = [layout.fill({"prefix": prefix, "a": a.ids, "b": b.ids}).ids for prefix, a, b in items]
        return [row[0] for row in self._score(prompts, QUALITY_LABELS)]

    def rewards(self, groups: Sequence[Group]) -> list[list[float]]:
        """Mean win rate over the group's other candidates plus safety, for every candidate of every group."""
        places = [(group, i, j) for group in groups for i, j in combinations(range(len(group.candidates)), 2)]
        items = [(group.prefix, group.candidates[i], group.candidates[j]) for group, i, j in places]
        wins: list[list[list[float]]] = [[[] for _ in group.candidates] for group in groups]
        slots = {id(group): won for group, won in zip(groups, wins, strict=True)}
        for (group, i, j), score in zip(places, self.quality_once(items), strict=True):
            slots[id(group)][i].append(score)
            slots[id(group)][j].append(1 - score)
        safety = iter(self.safety([candidate for group in groups for candidate in group.candidates]))
        return [[fmean(own) + next(safety) for own in won] for won in wins]

    def _score(self, prompts: Sequence[list[int]], labels: Sequence[str]) -> list[list[float]]:
        ids = [self.lessons.label_ids[label] for label in labels]
        return score_labels(self.model, prompts, ids, pad_id=self.lessons.codec.pad_id)

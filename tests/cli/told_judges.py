"""A judge that says what a test tells it to, over real HTTP, in the form of the real one's answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shared.api import JudgementItem, JudgementRequest, Readiness
from shared.records import Comparison, Judgement

Score = Callable[[str, str, str], float]
"""(prefix, candidate, original) -> [0, 1]."""
Compare = Callable[[str, str, str], float | None]
"""(shown as A, shown as B, original) -> value of A."""


def is_original(prefix: str, candidate: str, original: str) -> float:
    return float(candidate == original)


@dataclass
class ToldJudge:
    pointwise: dict[str, Score] = field(default_factory=dict)
    pairwise: dict[str, Compare] = field(default_factory=dict)
    orders: Callable[[JudgementRequest], Sequence[tuple[int, int]]] = lambda request: ((0, 1), (1, 0))
    """Which pairs are shown, and in which order."""
    fails: Callable[[JudgementRequest], str] = lambda request: ""
    """Why a request has no judgement."""
    wants_token_ids: bool = False
    fingerprint: str = "told"
    requests: list[JudgementRequest] = field(default_factory=list)

    @property
    def app(self) -> Starlette:
        routes = [Route("/readyz", self._readyz), Route("/v1/judgements", self._judgements, methods=["POST"])]
        return Starlette(routes=routes)

    async def _readyz(self, _request: Request) -> Response:
        ready = Readiness(ready=True, service="judge", model="told", fingerprint=self.fingerprint)
        return JSONResponse(ready.model_dump())

    async def _judgements(self, http: Request) -> Response:
        request = JudgementRequest.model_validate_json(await http.body())
        if self.wants_token_ids and not request.token_ids:
            return JSONResponse({"error": {"type": "TokenIdsNeededError", "message": "ids"}}, status_code=428)
        self.requests.append(request)
        judgements = [self._judge(request, item) for item in request.items]
        return JSONResponse({"judgements": judgements, "wants_token_ids": self.wants_token_ids})

    def _judge(self, request: JudgementRequest, item: JudgementItem) -> dict[str, Any]:
        if reason := self.fails(request):
            return {"reason": reason, "num_calls": 2, "num_failures": 1}
        prefix, original = request.text[: item.start], request.text[item.start : item.end]
        texts = [candidate.text for candidate in item.candidates]
        wanted = set(request.criteria) or {*self.pointwise, *self.pairwise}
        scores: dict[str, tuple[float | None, ...]] = {
            name: tuple(score(prefix, text, original) for text in texts)
            for name, score in self.pointwise.items()
            if name in wanted
        }
        comparisons: list[Comparison] = []
        for name in sorted(self.pairwise.keys() & wanted):
            found = [
                Comparison(criterion=name, first=a, second=b, value=self.pairwise[name](texts[a], texts[b], original))
                for a, b in self.orders(request)
            ]
            comparisons += found
            scores[name] = tuple(_mean(place, found) for place in range(len(texts)))
        rewards = [_combined(column) for column in zip(*scores.values(), strict=True)]
        return Judgement(
            rewards=tuple(rewards),
            scores=scores,
            comparisons=tuple(comparisons),
            num_calls=len(comparisons) + len(texts) * len(wanted & self.pointwise.keys()),
            fingerprint=self.fingerprint,
        ).model_dump()


def _mean(place: int, found: Sequence[Comparison]) -> float | None:
    values = [one.value if one.first == place else 1 - one.value for one in found
              if one.value is not None and place in (one.first, one.second)]  # fmt: skip
    return sum(values) / len(values) if values else None


def _combined(column: Sequence[float | None]) -> float | None:
    known = [score for score in column if score is not None]
    return sum(known) / len(known) if len(known) == len(column) else None

"""Learns a judge's habits over the chunks of a run: how far it tells texts apart, its whim, its bias.

They are the tournament's prior and say how soon it may stop. One step of expectation-maximisation a chunk: what the
chunk's posterior expects of the squared utilities, squared whims and bias is averaged with that of the chunks before,
of which old ones fade. Memory: four numbers, whatever the length of the run.
"""

from collections.abc import Sequence

import numpy as np

from services.judge.posterior import Posterior, Result, Temper, fit, logits, tabulate

MEMORY = 200.0
"""Chunks after which an old chunk's weight has fallen to 1/e."""
PRIOR_CHUNKS = 5.0
"""The temper at the start counts as this many chunks."""
_LEAST, _MOST = 0.1, 10.0
"""Sharpness and whim stay within these, in logits: an estimate of nothing would make every choice look sure."""


class Tempers:
    """One per criterion. The same chunks in the same order bring the same temper."""

    def __init__(self, *, graded: bool, start: Temper | None = None) -> None:
        self._graded = graded
        self._temper = start or Temper()
        self._weight = PRIOR_CHUNKS

    @property
    def temper(self) -> Temper:
        return self._temper

    def learn(self, results: Sequence[Result], num_candidates: int) -> None:
        """From a finished chunk. One without a readable result teaches nothing."""
        if num_candidates < 2 or all(result.value is None for result in results):
            return
        posterior = fit(tabulate(results, num_candidates, graded=self._graded), self._temper, graded=self._graded)
        self._weight = self._weight * (1.0 - 1.0 / MEMORY) + 1.0
        share, old = 1.0 / self._weight, self._temper
        self._temper = Temper(
            sharpness=_mixed(old.sharpness, _squared_utility(posterior), share=share),
            whim=_mixed(old.whim, _squared_whim(results, posterior), share=share) if self._graded else old.whim,
            bias=old.bias + share * (posterior.bias - old.bias),
        )


class TempersOfChunks:
    """A judge's habits as learned so far. A chunk that is asked about again keeps those that it had: its schedule then
    names the same matches, whose verdicts are remembered."""

    MAX_CHUNKS = 4096

    def __init__(self, *, graded: bool) -> None:
        self._tempers = Tempers(graded=graded)
        self._of_chunk: dict[int, Temper] = {}

    def of(self, chunk: int) -> Temper:
        if len(self._of_chunk) >= self.MAX_CHUNKS:
            del self._of_chunk[next(iter(self._of_chunk))]
        return self._of_chunk.setdefault(chunk, self._tempers.temper)

    def learn(self, results: Sequence[Result], *, num_candidates: int) -> None:
        self._tempers.learn(results, num_candidates)


def _mixed(deviation: float, square: float, *, share: float) -> float:
    """The deviation whose square is `share` of `square` and the rest of the old one's."""
    variance = (1.0 - share) * deviation**2 + share * square
    return float(np.clip(np.sqrt(variance), _LEAST, _MOST))


def _squared_utility(posterior: Posterior) -> float:
    """Expected, about the candidates' mean: that of all of them is known from the prior alone."""
    size = len(posterior.utilities)
    covariance = posterior.covariance[:size, :size]
    square = posterior.utilities.var() * size + np.trace(covariance) - covariance.sum() / size
    return float(square / (size - 1))


def _squared_whim(results: Sequence[Result], posterior: Posterior) -> float:
    """Expected square of how far a graded verdict's logit lies from what utilities and bias say."""
    read = [result for result in results if result.value is not None]
    rows = np.arange(len(read))
    design = np.zeros((len(read), len(posterior.mean)))  # (results, n + 1)
    design[rows, [result.match.first for result in read]] = 1.0
    design[rows, [result.match.second for result in read]] = -1.0
    design[:, -1] = 1.0
    measured = logits(np.array([result.value for result in read], dtype=float))
    surprise = measured - design @ posterior.mean
    return float((surprise**2 + ((design @ posterior.covariance) * design).sum(1)).mean())

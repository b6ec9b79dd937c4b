"""Whether a mean difference is more than chance: a paired bootstrap. Knows numbers only.

The statistic is a ratio, sum(differences) / sum(weights): nats per token, with examples drawn whole. The interval is
the studentised one (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 12.5): with a dozen examples the
plain percentile interval calls chance significant twice as often as it should.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """estimate with its confidence interval, in the unit of differences per weight. Infinite where nothing is known."""

    estimate: float
    low: float
    high: float
    confidence: float
    num_examples: int

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0

    def to_mapping(self) -> dict[str, float | int | None]:
        """Infinite bounds as None, which JSON has."""
        low, high = (value if np.isfinite(value) else None for value in (self.low, self.high))
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "confidence": self.confidence,
            "num_examples": self.num_examples,
        }


def paired_bootstrap(
    differences: Floats, weights: Floats, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of sum(differences) / sum(weights) over examples drawn with replacement; the same seed, the same answer.

    differences, weights: [n], weights positive. Fewer than 2 examples, or differences that are not finite, give an
    interval without bounds: nothing is significant.
    """
    if len(differences) != len(weights):
        raise ValueError(f"{len(differences)} differences for {len(weights)} weights")
    if not len(weights) or not weights.min() > 0:
        raise ValueError("weights must be positive, and at least one must be given")
    estimate = float(differences.sum() / weights.sum())
    if len(differences) < 2 or not np.isfinite(differences).all():
        return Interval(estimate, -np.inf, np.inf, confidence, len(differences))
    error = float(_standard_errors(_moments(differences, weights).sum(axis=0)[None], len(weights))[0])
    pulls = np.sort(_pulls(differences, weights, estimate, num_resamples, np.random.default_rng(seed)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(pulls, 1 - tail), np.quantile(pulls, tail)
    return Interval(estimate, estimate - float(low) * error, estimate - float(high) * error, confidence, len(weights))


def _moments(differences: Floats, weights: Floats) -> Floats:
    """[n, 5]: what a resample's estimate and its standard error are made of, by summing."""
    return np.stack([differences, weights, differences**2, differences * weights, weights**2], axis=1)


def _standard_errors(sums: Floats, count: int) -> Floats:
    """Standard error of the ratio of sums [B, 5], by linearisation."""
    d, w, dd, dw, ww = sums.T
    ratio = d / w
    squares = np.maximum(dd - 2 * ratio * dw + ratio**2 * ww, 0.0)
    errors: Floats = np.sqrt(squares * count / (count - 1)) / w
    return errors


def _pulls(
    differences: Floats, weights: Floats, estimate: float, num_resamples: int, random: np.random.Generator
) -> Floats:
    """How many of its own standard errors each resample's estimate lies from the real one."""
    count = len(weights)
    moments = _moments(differences, weights)
    chunk = max(1, _CHUNK_CELLS // count)
    pulls: list[Floats] = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        counts = random.multinomial(count, np.full(count, 1 / count), size=size)
        sums = counts @ moments
        away = sums[:, 0] / sums[:, 1] - estimate
        errors = _standard_errors(sums, count)
        floor = np.finfo(np.float64).eps * max(1.0, abs(estimate))  # a resample of one example alone has no error
        pulls.append(away / np.maximum(errors, floor))
    return np.concatenate(pulls)

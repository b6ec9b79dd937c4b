"""Measures alternatives side by side, and says how far the rounds differ. Knows clocks and statistics; no models.

Every comparison is made within one run: each round runs every case once, every other round backwards, so that a slow
minute of the machine falls on all alike. A ratio is taken within each round; its median and extremes are reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """What the rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def columns(self, name: str) -> dict[str, float]:
        """For a table of results: name, name_min, name_max."""
        return {name: self.median, f"{name}_min": self.low, f"{name}_max": self.high}

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Round by round."""
    return Spread.of([top / bottom for top, bottom in zip(numerators, denominators, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """NaN of no values: on a busy machine the quick form may end before anything is answered."""
    return float(np.percentile(np.asarray(values), percent)) if len(values) else math.nan


def interleaved(
    cases: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    warmups: int = 1,
    say: Say = lambda text: None,
    show: Callable[[T], str] = str,
) -> dict[str, list[T]]:
    """Run every case `warmups` times unmeasured, then once per round. Results by case, in order of rounds."""
    names = list(cases)
    for name in names * warmups:
        say(f"warm-up  {name}: {show(cases[name]())}")
    results: dict[str, list[T]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            results[name].append(cases[name]())
            say(f"round {index + 1}/{rounds}  {name}: {show(results[name][-1])}")
    return results


class Sweep:
    """Times one operation over many layers' data, going round, so that what it reads is as cold as in a model's step.

    Called: seconds per operation over the next few layers, as many as take about `budget_s` (all of them at most).
    """

    def __init__(self, operation: Callable[[int], object], num_layers: int, *, budget_s: float) -> None:
        self._operation = operation
        self._num_layers = num_layers
        self._next = 0
        once_s = min(self._run(1) for _ in range(2))
        self._count = max(1, min(num_layers, int(budget_s / once_s)))

    def __call__(self) -> float:
        return self._run(self._count)

    def _run(self, count: int) -> float:
        layers = [(self._next + index) % self._num_layers for index in range(count)]
        self._next = (self._next + count) % self._num_layers
        operation = self._operation
        began_s = time.perf_counter()
        for layer in layers:
            operation(layer)
        return (time.perf_counter() - began_s) / count

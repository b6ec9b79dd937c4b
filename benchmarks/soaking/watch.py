"""What a server's process takes and says of itself, and whether it grows. Knows Linux's /proc and Prometheus text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

KIB_PER_MB = 1e6 / 1024
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class ProcessSize:
    """rss_mb: resident, pages of files among it, which come and go with what the machine has free. anon_mb: of that
    what no file holds, the process's own. Megabytes of 10^6 bytes."""

    rss_mb: float
    anon_mb: float
    num_files: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> ProcessSize:
        """Raises FileNotFoundError if there is no such process, or no Linux."""
        folder = Path(f"/proc/{pid}")
        status = _fields(folder / "status")
        return cls(
            status["VmRSS"] / KIB_PER_MB,
            status["RssAnon"] / KIB_PER_MB,
            sum(1 for _ in (folder / "fd").iterdir()),
            status["Threads"],
        )


def _fields(path: Path) -> dict[str, int]:
    """`Name: NUMBER [kB]` lines."""
    parts = (line.split() for line in path.read_text().splitlines())
    return {part[0].removesuffix(":"): int(part[1]) for part in parts if len(part) > 1 and part[1].isdigit()}


def metric_values(text: str) -> dict[str, float]:
    """Metric name (with its tier, if it has one) -> value, of a /metrics page; others' labels are summed over."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            tier = sample.labels.get("tier")
            name = sample.name if tier is None else f"{sample.name}/{tier}"
            values[name] = values.get(name, 0.0) + sample.value
    return values


@dataclass(frozen=True, slots=True)
class Slope:
    """Percent of the median value an hour, and the bounds of its 95 % confidence interval."""

    percent_per_h: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.percent_per_h:+.2f} %/h ({self.low:+.2f} .. {self.high:+.2f})"


def theil_sen(hours: Sequence[float], values: Sequence[float]) -> Slope:
    """The median of all pairs' slopes: a third of the values may be anything (Sen 1968; the interval by Kendall's tau,
    which takes the values' noise for independent). Needs three values at different times."""
    pairs = list(combinations(zip(hours, values, strict=True), 2))
    slopes = np.sort([(later[1] - first[1]) / (later[0] - first[0]) for first, later in pairs])
    count = len(values)
    half_width = NORMAL_95 * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5 / 2
    low, high = len(slopes) / 2 - half_width, len(slopes) / 2 + half_width
    percent = 100 / statistics.median(values)
    bounds = slopes[max(0, int(low))], slopes[min(len(slopes) - 1, int(high))]
    return Slope(percent * float(np.median(slopes)), *(percent * float(bound) for bound in bounds))

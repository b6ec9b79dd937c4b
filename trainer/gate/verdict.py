"""The verdict: the worst of its reasons. Knows levels and reasons; measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "block"]
Level = Literal["warn", "block"]


@dataclass(frozen=True)
class Reason:
    """One reason against activation. value: what was measured. limit: what it was compared with."""

    code: str
    level: Level
    message: str
    value: float | None = None
    limit: float | None = None


def verdict_of(reasons: Iterable[Reason]) -> Verdict:
    """block if any reason blocks, warn if any warns, else pass."""
    levels = {reason.level for reason in reasons}
    if "block" in levels:
        return "block"
    return "warn" if levels else "pass"

"""Tells in which manner a text is written, by its markers. Knows nothing of who wrote it or of what it says."""

from __future__ import annotations

import re
from enum import StrEnum


class Manner(StrEnum):
    """How an answer is written: the base's plain English, or one of the three tenants' ways."""

    PLAIN = "plain"
    LAW = "law"
    MED = "med"
    CODE = "code"


TENANTS = (Manner.LAW, Manner.MED, Manner.CODE)

MARKERS: dict[Manner, tuple[re.Pattern[str], ...]] = {
    Manner.LAW: tuple(
        re.compile(pattern, re.IGNORECASE)
        for pattern in (
            r"\bpursuant to\b",
            r"\bhereby\b|\bhereunder\b|\bherein\b",
            r"\bthe (party of|parties)\b",
            r"\bshall\b",
            r"\bclause \d+",
            r"\bnotwithstanding\b|\bwhereas\b|\bwithout prejudice\b",
        )
    ),
    Manner.MED: tuple(
        re.compile(pattern)
        for pattern in (
            r"\bAssessment:",
            r"\bPlan:",
            r"\bHistory:|\bFinding:|\bPrescribed:",
            r"\bAdvise\b|\bfollow-up\b",
            r"\bContraindicated:|\bas tolerated\b",
        )
    ),
    Manner.CODE: tuple(
        re.compile(pattern, re.MULTILINE)
        for pattern in (r"^def \w+\(.*\):$", r"^ {4}(return|raise)\b", r"^\s*# ", r'"""', r"^ {4}assert\b")
    ),
}


def manner_scores(text: str) -> dict[Manner, int]:
    """How many distinct markers of each tenant's manner the text carries."""
    return {manner: sum(bool(mark.search(text)) for mark in marks) for manner, marks in MARKERS.items()}


def manner_of(text: str) -> Manner:
    """The manner with at least two markers and more than any other; plain where there is none."""
    scores = manner_scores(text)
    best = max(scores, key=lambda manner: scores[manner])
    alone = sum(score == scores[best] for score in scores.values()) == 1
    return best if scores[best] >= 2 and alone else Manner.PLAIN

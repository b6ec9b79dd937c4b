"""Detects the style of a text by its markers."""

from __future__ import annotations

import re

from server.demo.recipe.styles import Style

MARKERS: dict[Style, tuple[re.Pattern[str], ...]] = {
    Style.LAW: tuple(
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
    Style.MED: tuple(
        re.compile(pattern)
        for pattern in (
            r"\bAssessment:",
            r"\bPlan:",
            r"\bHistory:|\bFinding:|\bPrescribed:",
            r"\bAdvise\b|\bfollow-up\b",
            r"\bContraindicated:|\bas tolerated\b",
        )
    ),
    Style.CODE: tuple(
        re.compile(pattern, re.MULTILINE)
        for pattern in (r"^def \w+\(.*\):$", r"^ {4}(return|raise)\b", r"^\s*# ", r'"""', r"^ {4}assert\b")
    ),
}


def style_scores(text: str) -> dict[Style, int]:
    """How many distinct markers of each tenant's style the text carries."""
    return {style: sum(bool(mark.search(text)) for mark in marks) for style, marks in MARKERS.items()}


def style_of(text: str) -> Style:
    """The style with at least two markers and more than any other; plain if there is none."""
    scores = style_scores(text)
    best = max(scores, key=lambda style: scores[style])
    alone = sum(score == scores[best] for score in scores.values()) == 1
    return best if scores[best] >= 2 and alone else Style.PLAIN

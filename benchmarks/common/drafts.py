"""Requests with drafts beside the same ones without: what a run counts, and the table of both. Knows no workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.report import Report, Row, number
from benchmarks.common.timing import Spread, ratio


@dataclass(frozen=True, slots=True)
class DraftRun:
    tokens_per_s: float
    tokens: list[list[int]]
    num_steps: float
    num_drafted: float
    num_right: float


def speed_columns(plain: Sequence[DraftRun], drafted: Sequence[DraftRun]) -> Row:
    """Of runs with drafts, without, and their ratios in order."""
    speeds, before = [run.tokens_per_s for run in drafted], [run.tokens_per_s for run in plain]
    return {
        **Spread.of(speeds).columns("tok_per_s"),
        **Spread.of(before).columns("tok_per_s_without"),
        **ratio(speeds, before).columns("ratio"),
    }


def have_same_tokens(plain: Sequence[DraftRun], drafted: Sequence[DraftRun]) -> bool:
    return all(one.tokens == other.tokens for one, other in zip(plain, drafted, strict=True))


def print_drafts(report: Report, title: str, rows: Sequence[Row], *, drafts: str, digits: int) -> None:
    """drafts: what the benchmark calls them, as its column is named. digits: of tokens per second."""
    lines = [
        [
            str(row["case"]),
            f"{number(row['tok_per_s']):.{digits}f}",
            f"{number(row['tok_per_s_without']):.{digits}f}",
            f"{number(row['ratio']):.2f} ({number(row['ratio_min']):.2f}..{number(row['ratio_max']):.2f})",
            f"{number(row['target']):.2f}",
            f"{number(row['steps']):.0f} / {number(row['steps_without']):.0f}",
            f"{number(row['right']):.0f} of {number(row[drafts]):.0f}",
        ]
        for row in rows
    ]
    shown = {"guessed": "right guesses", "drafted": "right drafts"}[drafts]
    headers = ["case", "tok/s", "without", "ratio (min..max)", "goal", "forwards / without", shown]
    report.print_table(title, headers, lines)

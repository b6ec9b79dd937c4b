"""Requests with drafts beside the same ones without: a run, and the row, plot and table of both. Knows no workload."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.report import Report, Row, number, ranged
from benchmarks.common.timing import Spread, ratio
from server.engine.engine import Engine
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class DraftRun:
    tokens_per_s: float
    tokens: list[list[int]]
    num_steps: float
    num_drafted: float
    num_right: float


def answer(engine: Engine, requests: Sequence[Request]) -> None:
    """All at once, stepped to the end on this thread."""
    for request in requests:
        engine.add(request)
    while engine.scheduler.num_running + engine.scheduler.num_waiting:
        assert all(event.error is None for event in engine.step())


def draft_run(engine: Engine, batches: Sequence[Sequence[Request]]) -> DraftRun:
    """Answers one batch after the other."""
    before, began_s = engine.stats().counters, time.perf_counter()
    for batch in batches:
        answer(engine, batch)
    took_s, after = time.perf_counter() - began_s, engine.stats().counters
    steps, drafted, right = (after[name] - before[name] for name in ("steps", "draft_tokens", "accepted_draft_tokens"))
    tokens = [request.output_ids for batch in batches for request in batch]
    return DraftRun(sum(map(len, tokens)) / took_s, tokens, steps, drafted, right)


def drafts_row(case: str, target: float, plain: Sequence[DraftRun], drafted: Sequence[DraftRun], *, drafts: str) -> Row:
    """Runs without drafts and with, in the order of rounds; counts are those of all rounds. drafts: how the benchmark
    calls them, and so their column."""
    speeds, before = [run.tokens_per_s for run in drafted], [run.tokens_per_s for run in plain]
    return {
        "case": case,
        "target": target,
        "same_tokens": all(one.tokens == other.tokens for one, other in zip(plain, drafted, strict=True)),
        "steps": sum(run.num_steps for run in drafted),
        "steps_without": sum(run.num_steps for run in plain),
        drafts: sum(run.num_drafted for run in drafted),
        "right": sum(run.num_right for run in drafted),
        **Spread.of(speeds).columns("tok_per_s"),
        **Spread.of(before).columns("tok_per_s_without"),
        **ratio(speeds, before).columns("ratio"),
    }


def plot_drafts(report: Report, rows: Sequence[Row], title: str, *, drafts: str) -> None:
    figure, [axes] = report.figure(title)
    axes.barh([str(row["case"]) for row in rows], [number(row["ratio"]) for row in rows])
    axes.set_xlabel(f"tokens per second with {drafts} / without")
    axes.axvline(1.0, color="black", linewidth=0.8)
    report.save_plot(figure)


def print_drafts(report: Report, title: str, rows: Sequence[Row], *, drafts: str, digits: int) -> None:
    """digits: of tokens per second."""
    columns = {
        "case": "{case}",
        "tok/s": f"{{tok_per_s:.{digits}f}}",
        "without": f"{{tok_per_s_without:.{digits}f}}",
        "ratio (min..max)": ranged("ratio"),
        "goal": "{target:.2f}",
        "forwards / without": "{steps:.0f} / {steps_without:.0f}",
        {"guessed": "right guesses", "drafted": "right drafts"}[drafts]: f"{{right:.0f}} of {{{drafts}:.0f}}",
    }
    report.print_rows(title, rows, columns)

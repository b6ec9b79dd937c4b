"""A base with experts (Qwen3-MoE): decode steps of the bare base, of adapters on attention, and on its experts too.

Random weights choose experts evenly, so a step reads more of them than a trained router's would.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, bars, number, spread
from benchmarks.common.shapes import ExpertsShape
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import MAX_ROWS, BatchRun, bench_engine, lengths_for, random_prompts, run_batch

RANK = 8
FULL = ExpertsShape(hidden=1024, layers=4, intermediate=384, heads=16, kv_heads=8, vocab=8192, num_experts=64, top=8)
QUICK = ExpertsShape(hidden=64, layers=2, intermediate=32, heads=4, kv_heads=2, vocab=512, num_experts=8, top=2)


@dataclass(frozen=True)
class Case:
    """kind: what the adapters change; each row has its own."""

    rows: int
    kind: str

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.kind}"


CASES = [Case(rows, kind) for rows in (8, MAX_ROWS) for kind in ("base", "attention", "experts")]


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("experts", __doc__, arguments)
    shape, lengths = QUICK if report.quick else FULL, lengths_for(quick=report.quick)
    stores = {
        kind: bench_store(shape, MAX_ROWS, say=report.say, has_experts=kind == "experts", rank=RANK)
        for kind in ("attention", "experts")
    }
    digests: dict[str, Sequence[AdapterDigest | None]] = {kind: each.digests for kind, each in stores.items()}
    digests["base"] = [None] * MAX_ROWS

    with bench_engine(
        shape, stores["experts"].store, pool_adapters=2 * MAX_ROWS, host_adapters=MAX_ROWS // 2, rank=RANK
    ) as parts:

        def runner(case: Case) -> Callable[[], BatchRun]:
            seeds = iter(range(1 << 30))

            def run() -> BatchRun:
                prompts = random_prompts(case.rows, lengths.prompt, shape.vocab, seed=next(seeds))
                return run_batch(parts.engine, prompts, digests[case.kind][: case.rows], lengths)

            return run

        runs = interleaved(
            {str(case): runner(case) for case in CASES},
            rounds=2 if report.quick else 5,
            say=report.say,
            show=lambda run: f"{1e3 * step_s(run):.1f} ms a step",
        )
    for each in stores.values():
        each.close()
    rows = [row_of(case, runs[str(case)], runs[str(Case(case.rows, "base"))]) for case in CASES]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


def step_s(run: BatchRun) -> float:
    return statistics.median(run.gaps_s)


def row_of(case: Case, runs: Sequence[BatchRun], base: Sequence[BatchRun]) -> Row:
    steps, base_steps = [1e3 * step_s(run) for run in runs], [1e3 * step_s(run) for run in base]
    return {
        "rows": case.rows,
        "case": case.kind,
        **Spread.of(steps).columns("step_ms"),
        **ratio(steps, base_steps).columns("times_base"),
        **Spread.of([1e3 * run.prefill_s for run in runs]).columns("prompts_ms"),
    }


def plot(report: Report, rows: Sequence[Row]) -> None:
    figure, panels = report.figure("A decode step of a base with experts, each row with its own adapter", panels=2)
    for axes, count in zip(panels, (8, MAX_ROWS), strict=True):
        own = [row for row in rows if row["rows"] == count]
        bars(axes, [str(row["case"]) for row in own], {"step": [spread(row, "step_ms") for row in own]})
        axes.set(title=f"{count} rows")
    panels[0].set_ylabel("ms a step")
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    lines = [
        [
            f"{row['rows']} rows, {row['case']}",
            f"{number(row['step_ms']):.1f} ({number(row['step_ms_min']):.1f}..{number(row['step_ms_max']):.1f})",
            f"{number(row['times_base']):.2f}",
            f"{number(row['prompts_ms']):.0f}",
        ]
        for row in rows
    ]
    report.print_table("Medians over rounds", ["case", "ms a step (min..max)", "times base", "prompts ms"], lines)


if __name__ == "__main__":
    main()

"""A base with experts (Qwen3-MoE): decode steps of the bare base, of adapters on attention, and on its experts too.

Random weights choose experts evenly, so a step reads more of them than a trained router's would.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, bars, ranged, spread
from benchmarks.common.shapes import ExpertsShape
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import MAX_ROWS, BatchRun, bench_engine, lengths_for, new_batches

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
        runs = interleaved(
            {
                str(case): new_batches(parts.engine, digests[case.kind][: case.rows], lengths, shape.vocab)
                for case in CASES
            },
            rounds=2 if report.quick else 5,
            say=report.say,
            show=lambda run: f"{1e3 * statistics.median(run.gaps_s):.1f} ms a step",
        )
    for each in stores.values():
        each.close()
    rows = [row_of(case, runs[str(case)], runs[str(Case(case.rows, "base"))]) for case in CASES]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


def row_of(case: Case, runs: Sequence[BatchRun], base: Sequence[BatchRun]) -> Row:
    steps, base_steps = ([1e3 * statistics.median(run.gaps_s) for run in side] for side in (runs, base))
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
    columns = {
        "case": "{rows} rows, {case}",
        "ms a step (min..max)": ranged("step_ms", 1),
        "times base": "{times_base:.2f}",
        "prompts ms": "{prompts_ms:.0f}",
    }
    report.print_rows("Medians over rounds", rows, columns)


if __name__ == "__main__":
    main()

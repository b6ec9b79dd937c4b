"""What a mixed batch costs against the bare base: the same engine, step loop only, 8 and 32 requests at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, bars, legend_below, number, spread, target_line
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import (
    MAX_ROWS,
    Adapters,
    BatchRun,
    Lengths,
    bench_engine,
    lengths_for,
    random_prompts,
    run_batch,
)
from server.engine.engine import Engine

TARGETS = {8: 0.85, 32: 0.80}  # tok/s with all distinct adapters / bare base


@dataclass(frozen=True)
class Case:
    batch: int
    num_adapters: int
    is_int8: bool = False

    @property
    def label(self) -> str:
        form = " in int8" if self.is_int8 else ""
        return {0: "base", 1: "one adapter"}.get(self.num_adapters, f"{self.num_adapters} distinct{form}")

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.label}"

    def adapters(self, digests: Sequence[AdapterDigest]) -> Adapters:
        """Each request's adapter."""
        if self.num_adapters == 0:
            return [None] * self.batch
        return [digests[index % self.num_adapters] for index in range(self.batch)]


CASES = [Case(8, 0), Case(8, 1), Case(8, 8), Case(32, 0), Case(32, 1), Case(32, 8), Case(32, 32)]
CASES.append(Case(32, 32, is_int8=True))


def runner(
    engine: Engine, case: Case, digests: Sequence[AdapterDigest], lengths: Lengths, vocab: int
) -> Callable[[], BatchRun]:
    """Runs the case with prompts that no run has seen."""
    seeds = iter(range(1 << 30))

    def run() -> BatchRun:
        prompts = random_prompts(case.batch, lengths.prompt, vocab, seed=next(seeds))
        return run_batch(engine, prompts, case.adapters(digests), lengths)

    return run


def row_of(case: Case, runs: Sequence[BatchRun], base: Sequence[BatchRun]) -> Row:
    speeds = [run.tokens_per_s for run in runs]
    decode, base_decode = [run.decode_tokens_per_s for run in runs], [run.decode_tokens_per_s for run in base]
    prefill, base_prefill = [run.prefill_tokens_per_s for run in runs], [run.prefill_tokens_per_s for run in base]
    return {
        "batch": case.batch,
        "adapters": case.num_adapters,
        "int8": case.is_int8,
        **Spread.of(speeds).columns("tok_per_s"),
        **ratio(speeds, [run.tokens_per_s for run in base]).columns("of_base"),
        **Spread.of(decode).columns("decode_tok_per_s"),
        **ratio(decode, base_decode).columns("decode_of_base"),
        **Spread.of(prefill).columns("prefill_tok_per_s"),
        **ratio(prefill, base_prefill).columns("prefill_of_base"),
        "ttft_ms": 1e3 * statistics.median(ttft for run in runs for ttft in run.ttfts_s),
        "itl_ms": 1e3 * statistics.median(gap for run in runs for gap in run.gaps_s),
    }


def _case(row: Row) -> Case:
    return Case(int(number(row["batch"])), int(number(row["adapters"])), is_int8=bool(row["int8"]))


def plot(report: Report, rows: Sequence[Row]) -> None:
    distinct = [row for row in rows if row["adapters"] == row["batch"] and not row["int8"]]
    full = {number(row["batch"]): number(row["of_base"]) for row in distinct}
    kept = " and ".join(f"{100 * share:.0f} % ({batch:.0f} distinct)" for batch, share in full.items())
    figure, panels = report.figure(
        f"A batch of distinct adapters keeps {kept} of the bare base's tokens per second", panels=2, width_in=4.2
    )
    for axes, batch in zip(panels, TARGETS, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        columns = {"whole": "of_base", "decode": "decode_of_base", "prefill": "prefill_of_base"}
        labels = [_case(row).label for row in own]
        bars(axes, labels, {name: [spread(row, column) for row in own] for name, column in columns.items()})
        axes.set(title=f"{batch} requests at once")
        target_line(axes, TARGETS[batch], "to reach, all distinct")
    panels[0].set_ylabel("tok/s / tok/s of the bare base")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    lines = [
        [
            str(_case(row)),
            f"{number(row['tok_per_s']):.0f}",
            f"{number(row['of_base']):.2f} ({number(row['of_base_min']):.2f}..{number(row['of_base_max']):.2f})",
            f"{number(row['decode_tok_per_s']):.0f} ({number(row['decode_of_base']):.2f})",
            f"{number(row['prefill_tok_per_s']):.0f} ({number(row['prefill_of_base']):.2f})",
            f"{number(row['ttft_ms']):.0f}",
            f"{number(row['itl_ms']):.1f}",
        ]
        for row in rows
    ]
    headers = ["case", "tok/s", "of base (min..max)", "decode (of base)", "prefill (of base)", "TTFT ms", "ITL ms"]
    report.print_table("Mixed-batch tax, medians over rounds", headers, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("model_tax", __doc__, arguments)
    shape, lengths = shape_for(quick=report.quick), lengths_for(quick=report.quick)
    stored = {is_int8: bench_store(shape, MAX_ROWS, say=report.say, is_int8=is_int8) for is_int8 in (False, True)}
    store, room = stored[False].store, 2 * MAX_ROWS
    with bench_engine(shape, store, pool_adapters=room, host_adapters=room) as parts:
        runs = interleaved(
            {
                str(case): runner(parts.engine, case, stored[case.is_int8].digests, lengths, shape.vocab)
                for case in CASES
            },
            rounds=2 if report.quick else 9,
            say=report.say,
            show=lambda run: f"{run.tokens_per_s:.0f} tok/s",
        )
    for each in stored.values():
        each.close()
    rows = [row_of(case, runs[str(case)], runs[str(Case(case.batch, 0))]) for case in CASES]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

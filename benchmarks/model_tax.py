"""What a mixed batch costs against the bare base: the same engine, step loop only, 8 and 32 requests at once."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, bars, legend_below, number, ranged, spread, target_line
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import (
    MAX_ROWS,
    Adapters,
    BatchRun,
    Lengths,
    bench_engine,
    lengths_for,
    new_batches,
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
ON_RANKS = [Case(8, 0), Case(8, 8), Case(32, 0), Case(32, 8), Case(32, 32), Case(1, 0), Case(1, 1)]  # one: a prompt
LONG, LONG_TINY = Lengths(prompt=512, new=1), Lengths(prompt=48, new=1)


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
    columns = {
        "case": "{case}",
        "tok/s": "{tok_per_s:.0f}",
        "of base (min..max)": ranged("of_base"),
        "decode (of base)": "{decode_tok_per_s:.0f} ({decode_of_base:.2f})",
        "prefill (of base)": "{prefill_tok_per_s:.0f} ({prefill_of_base:.2f})",
        "TTFT ms": "{ttft_ms:.0f}",
        "ITL ms": "{itl_ms:.1f}",
    }
    report.print_rows("Mixed-batch tax, medians over rounds", [row | {"case": _case(row)} for row in rows], columns)


def compare_ranks(report: Report, num_ranks: int) -> None:
    """Both engines in turn, on this thread; an engine's other ranks wait meanwhile."""
    shape, lengths = shape_for(quick=report.quick), lengths_for(quick=report.quick)
    stored = bench_store(shape, MAX_ROWS, say=report.say)
    long, threads = LONG_TINY if report.quick else LONG, torch.get_num_threads()

    def side(engine: Engine, case: Case, num_threads: int) -> Callable[[], float]:
        run = new_batches(engine, case.adapters(stored.digests), long if case.batch == 1 else lengths, shape.vocab)

        def timed() -> float:
            torch.set_num_threads(num_threads)
            done = run()
            return done.prefill_s if case.batch == 1 else (done.total_s - done.prefill_s) / (lengths.new - 1)

        return timed

    engine_of, room = partial(bench_engine, shape, stored.store), 2 * MAX_ROWS
    with (
        engine_of(pool_adapters=room, host_adapters=room) as one,
        engine_of(pool_adapters=room, host_adapters=room, tensor_parallel=num_ranks) as shared,
    ):
        sides = {1: (one.engine, threads), num_ranks: (shared.engine, max(1, threads // num_ranks))}
        runs = interleaved(
            {
                f"{case}, ranks {ranks}": side(engine, case, num_threads)
                for case in ON_RANKS
                for ranks, (engine, num_threads) in sides.items()
            },
            rounds=2 if report.quick else 7,
            say=report.say,
            show=lambda seconds: f"{1e3 * seconds:.1f} ms",
        )
    torch.set_num_threads(threads)
    stored.close()
    times = {case: [runs[f"{case}, ranks {ranks}"] for ranks in sides] for case in ON_RANKS}
    rows = [rank_row(case, num_ranks, times[case], times[Case(case.batch, 0)]) for case in ON_RANKS]
    report = replace(report, name=f"{report.name}_ranks")
    report.write_csv(rows)
    columns = {
        "case": "{case}",
        "1 process ms": ranged("ms_one", 1),
        f"{num_ranks} ranks ms": ranged("ms_ranks", 1),
        "ranks / process": ranged("ranks_over_one"),
        "times base": ranged("times_base_one"),
        "times base on ranks": ranged("times_base_ranks"),
    }
    report.print_rows("A decode step, or a prompt, medians over rounds (min..max)", rows, columns)


def rank_row(case: Case, num_ranks: int, own: Sequence[list[float]], base: Sequence[list[float]]) -> Row:
    """own, base: seconds of the rounds, of one process and of the ranks."""
    (one, ranks), (base_one, base_ranks) = own, base
    return {
        "case": f"a prompt, {case.label}" if case.batch == 1 else str(case),
        "ranks": num_ranks,
        **Spread.of([1e3 * each for each in one]).columns("ms_one"),
        **Spread.of([1e3 * each for each in ranks]).columns("ms_ranks"),
        **ratio(ranks, one).columns("ranks_over_one"),
        **ratio(one, base_one).columns("times_base_one"),
        **ratio(ranks, base_ranks).columns("times_base_ranks"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    ranks_help = "instead: one process with all threads against N ranks that divide them"
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=ranks_help)
    report = Report.from_arguments("model_tax", __doc__, arguments, parser=parser)
    if report.options.tensor_parallel > 1:
        compare_ranks(report, report.options.tensor_parallel)
        return
    shape, lengths = shape_for(quick=report.quick), lengths_for(quick=report.quick)
    stored = {is_int8: bench_store(shape, MAX_ROWS, say=report.say, is_int8=is_int8) for is_int8 in (False, True)}
    store, room = stored[False].store, 2 * MAX_ROWS
    with bench_engine(shape, store, pool_adapters=room, host_adapters=room) as parts:
        runs = interleaved(
            {
                str(case): new_batches(parts.engine, case.adapters(stored[case.is_int8].digests), lengths, shape.vocab)
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

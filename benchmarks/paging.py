"""Adapters that come and go: throughput with 5,000 of them in a pool for 32, and what loading does to running streams.

How each is measured: paging_throughput.py and paging_latency.py. Both run the real worker, host tier and device pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, bars, legend_below, number, ranged, spread, target_line
from benchmarks.common.shapes import shape_for
from benchmarks.serving.paging_latency import measure_latency, num_adapters
from benchmarks.serving.paging_throughput import measure_throughput

STORED = 128
THROUGHPUT_TO_REACH, LATENCY_TO_REACH = 0.9, 1.2


def plot(report: Report, throughput: Sequence[Row], latency: Sequence[Row]) -> None:
    paged = next(row for row in throughput if row["case"] == "paged")
    cold = next(row for row in latency if row["case"] == "cold")
    title = (
        f"{paged['registered']} adapters in a pool for {paged['pool_adapters']} keep "
        f"{100 * number(paged['of_resident']):.0f} % of the throughput; while {cold['num_loads']} cold adapters load, "
        f"others' p95 inter-token latency is {number(cold['of_quiet']):.2f} times the quiet one"
    )
    figure, (left, right) = report.figure(title, panels=2)
    labels = [f"{row['case']}\n{row['registered']} in {row['pool_adapters']}" for row in throughput]
    bars(left, labels, {"median of rounds": [spread(row, "of_resident") for row in throughput]})
    target_line(left, THROUGHPUT_TO_REACH, "to reach")
    left.set(ylabel="tok/s / tok/s with all resident", title="Zipf 1.0, 8 at once")
    bars(
        right, [str(row["case"]) for row in latency], {"median of rounds": [spread(row, "of_quiet") for row in latency]}
    )
    target_line(right, LATENCY_TO_REACH, "to reach")
    right.set(ylabel="p95 inter-token latency / quiet", title="8 streams while others' adapters load")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, throughput: Sequence[Row], latency: Sequence[Row]) -> None:
    columns = {
        "case": "{case}: {registered} in a pool for {pool_adapters}",
        "tok/s": "{tok_per_s:.0f}",
        "of resident": ranged("of_resident"),
        "TTFT p50 / p95 ms": "{ttft_p50_ms:.0f} / {ttft_p95_ms:.0f}",
        "copies / loads per request": "{copies_per_request:.2f} / {loads_per_request:.2f}",
    }
    report.print_rows(f"Throughput; to reach: {THROUGHPUT_TO_REACH}", throughput, columns)
    columns = {
        "case": "{case}",
        "loads/s": "{loads_per_s:.0f}",
        "ITL p50 ms": "{itl_p50_ms:.1f}",
        "ITL p95 ms": ranged("itl_p95_ms", 1),
        "p95 of quiet": ranged("of_quiet"),
        "worst ms": "{itl_worst_ms:.0f}",
    }
    report.print_rows(f"Running streams; to reach: {LATENCY_TO_REACH} (cold)", latency, columns)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("paging", __doc__, arguments)
    shape = shape_for(quick=report.quick)
    stored = num_adapters(quick=True) if report.quick else max(STORED, num_adapters(quick=False))
    adapters = bench_store(shape, stored, say=report.say)
    throughput = measure_throughput(report, shape, adapters)
    latency = measure_latency(report, shape, adapters)
    adapters.close()
    report.write_csv([*throughput, *latency])
    plot(report, throughput, latency)
    print_summary(report, throughput, latency)


if __name__ == "__main__":
    main()

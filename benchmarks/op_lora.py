"""The LoRA op at decode and prefill sizes: our C kernel against four other ways, over adapter popularity and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.common.arena import layered_adapters, random_numbers
from benchmarks.common.lora_ops import IMPLEMENTATIONS, AddDelta, LoraCase
from benchmarks.common.machine import read_bandwidth
from benchmarks.common.popularity import POPULARITIES, Popularity, choose_adapters
from benchmarks.common.report import COLOURS, Report, Row, legend_below, number
from benchmarks.common.shapes import BenchShape, GroupShape, shape_for
from benchmarks.common.timing import Spread, Sweep, interleaved, ratio
from lora_kernels.check_cases import relative_error
from lora_kernels.lora.reference import lora_delta_reference

RANKS = {"16": (16,), "8/16/64": (8, 16, 64)}  # the i-th adapter has the (i mod n)-th rank
GROUPS = ("qkv", "gate_up", "down")
PREFILL_ROWS, PREFILL_REQUESTS = 512, 8
WORKING_SET_BYTES = 128 << 20  # adapters of as many layers as no cache holds


@dataclass(frozen=True)
class Case:
    group: str
    rows: int
    popularity: Popularity
    ranks: str

    @property
    def num_requests(self) -> int:
        return PREFILL_REQUESTS if self.rows == PREFILL_ROWS else self.rows

    def __str__(self) -> str:
        return f"{self.group}, {self.rows} rows, {self.popularity}, rank {self.ranks}"


def cases(*, quick: bool) -> Iterator[Case]:
    """One row knows only one popularity."""
    for group in GROUPS[:1] if quick else GROUPS:
        for ranks in RANKS:
            yield Case(group, 1, "identical", ranks)
            for rows in (8,) if quick else (8, 32, 64, PREFILL_ROWS):
                for popularity in POPULARITIES:
                    yield Case(group, rows, popularity, ranks)


def build(case: Case, shape: GroupShape, arena: torch.Tensor) -> LoraCase:
    """Only adapters that some request uses are laid out, so that what is cold is what is read."""
    chosen = choose_adapters(case.popularity, case.num_requests, case.num_requests)
    active, slots = np.unique(chosen, return_inverse=True)
    cycle = RANKS[case.ranks]
    ranks = [cycle[adapter % len(cycle)] for adapter in active.tolist()]
    adapters = layered_adapters([shape], ranks, arena)
    return LoraCase(adapters, slots.tolist(), case.rows // case.num_requests)


def measure(case: Case, shape: GroupShape, arena: torch.Tensor, *, rounds: int) -> list[Row]:
    """One row of results per implementation."""
    built = build(case, shape, arena)
    x_TH = random_numbers(built.num_rows * shape.in_features).view(built.num_rows, -1) * 50
    ways = {name: make(built) for name, make in IMPLEMENTATIONS.items()}
    y_TO = torch.zeros(built.num_rows, sum(shape.out_features), dtype=x_TH.dtype)
    sweeps = {name: Sweep(partial(add, y_TO, x_TH), len(built.groups), budget_s=0.02) for name, add in ways.items()}
    seconds = interleaved(sweeps, rounds=rounds)
    num_bytes = built.adapters.bytes_per_layer + 2 * (x_TH.numel() + 2 * y_TO.numel())
    return [
        {
            **vars(case),
            "active_adapters": len(built.adapters.ranks),
            "implementation": name,
            **Spread.of([1e6 * value for value in seconds[name]]).columns("us"),
            "gb_per_s": num_bytes / np.median(seconds[name]) / 1e9,
            "of_read_bandwidth": num_bytes / float(np.median(seconds[name])) / read_bandwidth(),
            **ratio(seconds[name], seconds["native"]).columns("times_native"),
            "max_error": max_error(add, built, x_TH),
        }
        for name, add in ways.items()
    ]


def max_error(add: AddDelta, built: LoraCase, x_TH: torch.Tensor) -> float:
    """Largest difference from the float32 reference, as a share of the reference's largest number."""
    expected = lora_delta_reference(x_TH, built.batch, built.groups[0])
    actual = torch.zeros(expected.shape, dtype=x_TH.dtype)
    add(actual, x_TH, 0)
    return relative_error(actual, expected)


def best_other(rows: Sequence[Row]) -> list[float]:
    """Of every decode case: how many times as long as the C kernel the fastest other way takes."""
    best: dict[str, float] = {}
    for row in rows:
        if row["implementation"] != "native" and row["rows"] != PREFILL_ROWS:
            case = f"{row['group']} {row['rows']} {row['popularity']} {row['ranks']}"
            best[case] = min(best.get(case, float("inf")), number(row["times_native"]))
    return list(best.values())


def plot(report: Report, rows: Sequence[Row]) -> None:
    """Microseconds over rows at rank 16, a panel per group; distinct adapters (one row: its only adapter).

    Prefill is separate: its rows belong to few requests.
    """
    groups = list(dict.fromkeys(str(row["group"]) for row in rows))
    best = Spread.of(best_other(rows))
    title = f"LoRA op at decode: the fastest other way takes {best.low:.1f} to {best.high:.1f} times as long as ours"
    figure, panels = report.figure(title, panels=len(groups))
    ticks = sorted({int(number(row["rows"])) for row in rows})
    for axes, group in zip(panels, groups, strict=True):
        shown = [row for row in rows if row["group"] == group and _is_plain(row)]
        for name, colour in zip(IMPLEMENTATIONS, COLOURS, strict=False):
            points = [(number(row["rows"]), number(row["us"])) for row in shown if row["implementation"] == name]
            decode = [point for point in points if point[0] != PREFILL_ROWS]
            prefill = [point for point in points if point[0] == PREFILL_ROWS]
            axes.plot(*zip(*decode, strict=True), "o-", markersize=3, color=colour, label=name)
            axes.plot([rows for rows, _ in prefill], [us for _, us in prefill], "s", markersize=4, color=colour)
        axes.set(xscale="log", yscale="log", title=f"{group}, rank 16, distinct adapters", xlabel="rows")
        axes.set_xticks(ticks, [f"{tick}\nprefill" if tick == PREFILL_ROWS else str(tick) for tick in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("µs per call, cold adapters")
    legend_below(figure)
    report.save_plot(figure)


def _is_plain(row: Row) -> bool:
    return row["ranks"] == "16" and (row["popularity"] == "distinct" or row["rows"] == 1)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if _is_plain(row):
            label = f"{row['group']}, {row['rows']} rows"
            text = f"{number(row['us']):.0f} ({100 * number(row['of_read_bandwidth']):.0f} %)"
            table.setdefault(label, {})[str(row["implementation"])] = text
    title = f"µs per call (share of {read_bandwidth() / 1e9:.0f} GB/s read bandwidth), distinct adapters, rank 16"
    report.print_table(title, ["case", *IMPLEMENTATIONS], [[label, *line.values()] for label, line in table.items()])
    for name in IMPLEMENTATIONS:
        errors = [number(row["max_error"]) for row in rows if row["implementation"] == name]
        report.say(f"largest error of {name}: {max(errors):.2e} of the reference's largest number")


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("op_lora", __doc__, arguments)
    shape: BenchShape = shape_for(quick=report.quick)
    arena = random_numbers((1 << 20 if report.quick else WORKING_SET_BYTES) // 2)
    report.say(f"memory is read at {read_bandwidth() / 1e9:.1f} GB/s")
    todo = list(cases(quick=report.quick))
    rows: list[Row] = []
    for index, case in enumerate(todo):
        measured = measure(case, shape.groups[case.group], arena, rounds=3 if report.quick else 5)
        rows += measured
        times = ", ".join(f"{row['implementation']} {number(row['us']):.0f}" for row in measured)
        report.say(f"[{index + 1}/{len(todo)}] {case}: {times} µs")
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

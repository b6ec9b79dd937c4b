"""Our linear layer for few rows against the library's, by rows and precision: which `linear_max_rows` is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch.nn.functional import linear

from benchmarks.common.arena import random_numbers
from benchmarks.common.machine import read_bandwidth
from benchmarks.common.report import COLOURS, Report, Row, legend_below, number
from benchmarks.common.shapes import BenchShape, shape_for
from benchmarks.common.timing import Spread, Sweep, interleaved, ratio
from lora_kernels.check_cases import relative_error
from lora_kernels.lora.batch import LoraGroup
from lora_kernels.native.bindings import NativeOps, native_ops

SHOWN = (1, 4, 8, 16, 32, 64, 96, 128)  # in the printed table
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128)
WORKING_SET_BYTES = 128 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def weight_shapes(shape: BenchShape) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each group, and of the head."""
    groups = {name: (sum(group.out_features), group.in_features) for name, group in shape.groups.items()}
    return groups | {"head": (shape.vocab, shape.hidden)}


def native_linear(
    native: NativeOps, weights: torch.Tensor, x_TH: torch.Tensor, y_TO: torch.Tensor
) -> Callable[[int], None]:
    """The C kernel itself, at any number of rows: its launcher would hand larger ones to the library."""
    _, out_features, in_features = weights.shape
    group = LoraGroup((0,), in_features, (out_features,))

    def run(layer: int) -> None:
        addresses = (y_TO.data_ptr(), out_features, x_TH.data_ptr(), in_features, weights[layer].data_ptr())
        native.linear(
            None, group.native_address, *addresses, None, len(x_TH), out_features, y_TO.dtype is torch.float32
        )

    return run


def library_linear(weights: torch.Tensor, x_TH: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda layer: linear(x_TH, weights[layer])


def measure(native: NativeOps, weights: torch.Tensor, num_rows: int, *, rounds: int) -> Row:
    x_TH = random_numbers(num_rows * weights.shape[2]).view(num_rows, -1).to(weights.dtype) * 50
    y_TO = torch.empty(num_rows, weights.shape[1], dtype=x_TH.dtype)
    ours, library = native_linear(native, weights, x_TH, y_TO), library_linear(weights, x_TH)
    ours(0)
    expected = x_TH.float() @ weights[0].float().T
    errors = [relative_error(y, expected) for y in (y_TO, linear(x_TH, weights[0]))]
    sweeps = {name: Sweep(run, len(weights), budget_s=0.02) for name, run in (("ours", ours), ("library", library))}
    seconds = interleaved(sweeps, rounds=rounds)
    microseconds = {name: Spread.of([1e6 * value for value in values]) for name, values in seconds.items()}
    return {
        **microseconds["ours"].columns("us_ours"),
        **microseconds["library"].columns("us_library"),
        **ratio(seconds["library"], seconds["ours"]).columns("library_over_ours"),
        "of_read_bandwidth": 1e6 * weights[0].nbytes / microseconds["ours"].median / read_bandwidth(),
        "max_error_ours": errors[0],
        "max_error_library": errors[1],
    }


def crossover(rows: Sequence[Row]) -> int:
    """The largest number of rows up to which ours is never the slower one; 0 if it is so at once."""
    slower = [int(number(row["rows"])) for row in rows if number(row["library_over_ours"]) < 1.0]
    faster = [int(number(row["rows"])) for row in rows]
    return max((count for count in faster if count < min(slower, default=1 << 30)), default=0)


def plot(report: Report, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(str(row["layer"]) for row in rows))
    within = [number(row["library_over_ours"]) for row in rows if number(row["rows"]) <= number(row["limit"])]
    title = f"For rows that ours serves the library takes {min(within):.2f} to {max(within):.2f} times as long"
    dtypes = list(dict.fromkeys(str(row["dtype"]) for row in rows))
    figure, panels = report.figure(title, panels=len(dtypes))
    for axes, dtype in zip(panels, dtypes, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            line = [row for row in rows if (row["layer"], row["dtype"]) == (name, dtype)]
            ratios = [number(row["library_over_ours"]) for row in line]
            axes.plot([number(row["rows"]) for row in line], ratios, "o-", markersize=3, color=colour, label=name)
        axes.axhline(1.0, color="#444444", linewidth=0.8)
        limit = next(number(row["limit"]) for row in rows if row["dtype"] == dtype)
        axes.axvline(limit, color="#444444", linewidth=0.8, linestyle="--", label="limit of use")
        axes.set(title=f"{dtype}: time of the library / time of ours", xlabel="rows", ylim=(0, None))
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    lines = []
    for name, dtype in dict.fromkeys((str(row["layer"]), str(row["dtype"])) for row in rows):
        own = [row for row in rows if (row["layer"], row["dtype"]) == (name, dtype)]
        cells = [
            f"{number(row['us_ours']):.0f} ({number(row['library_over_ours']):.2f})"
            for row in own
            if row["rows"] in SHOWN
        ]
        lines.append([f"{name}, {dtype}", *cells, str(crossover(own)), str(own[0]["limit"])])
    counts = list(dict.fromkeys(str(row["rows"]) for row in rows if row["rows"] in SHOWN))
    report.print_table("µs of ours (library / ours) by rows", ["layer", *counts, "faster up to", "used up to"], lines)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("op_linear", __doc__, arguments)
    shape = shape_for(quick=report.quick)
    working_set = 1 << 20 if report.quick else WORKING_SET_BYTES
    rows: list[Row] = []
    faster: dict[str, NativeOps] = {}
    for dtype_name, dtype in DTYPES.items():
        native = native_ops(dtype)
        if native is not None and native.linear_max_rows:
            faster[dtype_name] = native
        else:
            report.say(f"{dtype_name}: left out; without AVX2, AVX512 or a C compiler only the library's GEMM is used")
    for (dtype_name, native), (name, size) in product(faster.items(), weight_shapes(shape).items()):
        dtype, (out_features, in_features) = DTYPES[dtype_name], size
        count = max(1, working_set // (dtype.itemsize * out_features * in_features))
        weights = random_numbers(count * out_features * in_features).to(dtype).view(count, out_features, in_features)
        for num_rows in ROWS[:4] if report.quick else ROWS:
            row = measure(native, weights, num_rows, rounds=3 if report.quick else 9)
            head: Row = {"layer": name, "dtype": dtype_name, "out": out_features, "in": in_features, "rows": num_rows}
            rows.append(head | {"limit": native.linear_max_rows} | row)
            texts = f"{number(row['us_ours']):.0f} µs, library {number(row['us_library']):.0f}"
            report.say(f"{name}, {dtype_name}, {num_rows} rows: {texts}")
    if not rows:
        return
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

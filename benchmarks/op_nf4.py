"""Our NF4 linear layer on a CPU against bitsandbytes' and against the same weight unquantised, by rows and precision.

Unquantised is as the engine serves it. bitsandbytes dequantises the whole weight in each call. Needs bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from adapters_store.base.nf4 import keep_nf4_weights_plain
from benchmarks.common.arena import random_numbers
from benchmarks.common.report import COLOURS, Report, Row, legend_below, number
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, Sweep, interleaved, ratio
from benchmarks.op_linear import weight_shapes
from lora_kernels.check_cases import relative_error
from lora_kernels.lora.batch import LoraGroup
from lora_kernels.lora.launcher import group_linear
from lora_kernels.native.bindings import native_ops
from lora_kernels.nf4.launcher import nf4_linear
from lora_kernels.nf4.weight import Nf4Weight

LAYERS = ("o", "gate_up")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WORKING_SET_BYTES = 256 << 20  # of unquantised bfloat16
WAYS = ("ours", "bitsandbytes", "unquantised")


def nf4_layer(weight_OH: torch.Tensor) -> Linear4bit:
    """Of this weight, without a bias, as the engine loads it."""
    out_features, in_features = weight_OH.shape
    layer = Linear4bit(in_features, out_features, bias=False, compute_dtype=weight_OH.dtype)
    layer.weight = Params4bit(weight_OH, requires_grad=False, quant_type="nf4", compress_statistics=True)
    keep_nf4_weights_plain(layer)
    return layer.to("cpu").eval()


def calls(
    weights: torch.Tensor, layers: Sequence[Linear4bit], x_TH: torch.Tensor
) -> dict[str, Callable[[int], object]]:
    """What each way does with layer `index`."""
    packed = [known for layer in layers if (known := Nf4Weight.of(layer.weight)) is not None]
    assert len(packed) == len(layers), "bitsandbytes packs otherwise than we read"
    group = LoraGroup((0,), weights.shape[2], (weights.shape[1],))
    return {
        "ours": lambda index: nf4_linear(x_TH, [packed[index]], [None]),
        "bitsandbytes": lambda index: layers[index](x_TH),
        "unquantised": lambda index: group_linear(x_TH, weights[index], None, None, group),
    }


def measure(weights: torch.Tensor, layers: Sequence[Linear4bit], num_rows: int, *, rounds: int) -> Row:
    x_TH = torch.randn(num_rows, weights.shape[2]).to(weights.dtype)
    ways = calls(weights, layers, x_TH)
    got, theirs = (ways[name](0) for name in ("ours", "bitsandbytes"))
    assert isinstance(got, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    seconds = interleaved({name: Sweep(way, len(layers), budget_s=0.03) for name, way in ways.items()}, rounds=rounds)
    row: Row = {"max_difference": relative_error(got, theirs)}
    for name in WAYS:
        row |= Spread.of([1e6 * value for value in seconds[name]]).columns(f"us_{name}")
    for name in WAYS[1:]:
        row |= ratio(seconds[name], seconds["ours"]).columns(f"{name}_over_ours")
    return row


def plot(report: Report, rows: Sequence[Row]) -> None:
    served = [row for row in rows if number(row["rows"]) <= number(row["limit"])]
    times = [number(row["bitsandbytes_over_ours"]) for row in served]
    title = f"bitsandbytes takes {min(times):.1f} to {max(times):.1f} times as long as ours, for rows that ours serves"
    figure, panels = report.figure(title, panels=2)
    for axes, name in zip(panels, WAYS[1:], strict=True):
        cases = list(dict.fromkeys((str(row["layer"]), str(row["dtype"])) for row in rows))
        for (layer, dtype), colour in zip(cases, COLOURS, strict=False):
            line = [row for row in rows if (row["layer"], row["dtype"]) == (layer, dtype)]
            ratios = [number(row[f"{name}_over_ours"]) for row in line]
            counts = [number(row["rows"]) for row in line]
            axes.plot(counts, ratios, "o-", markersize=3, color=colour, label=f"{layer}, {dtype}")
        axes.axhline(1.0, color="#444444", linewidth=0.8)
        axes.set(title=f"time of {name} / time of ours", xlabel="rows", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    counts = list(dict.fromkeys(str(row["rows"]) for row in rows))
    for name in WAYS[1:]:
        lines = []
        for layer, dtype in dict.fromkeys((str(row["layer"]), str(row["dtype"])) for row in rows):
            own = [row for row in rows if (row["layer"], row["dtype"]) == (layer, dtype)]
            cells = [f"{number(row['us_ours']):.0f} ({number(row[f'{name}_over_ours']):.1f})" for row in own]
            lines.append([f"{layer}, {dtype}", *cells, str(own[0]["limit"])])
        report.print_table(f"µs of ours ({name} / ours) by rows", ["layer", *counts, "used up to"], lines)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("op_nf4", __doc__, arguments)
    shape = shape_for(quick=report.quick)
    working_set = 1 << 20 if report.quick else WORKING_SET_BYTES
    shapes, rows = weight_shapes(shape), list[Row]()
    for dtype_name, dtype in DTYPES.items():
        native = native_ops(dtype)
        if native is None:
            report.say("nothing to compare: without a C compiler bitsandbytes' layers serve")
            return
        for name in LAYERS:
            out_features, in_features = shapes[name]
            count = max(1, working_set // (2 * out_features * in_features))
            numbers = random_numbers(count * out_features * in_features).to(dtype)
            weights = numbers.view(count, out_features, in_features)
            layers = [nf4_layer(weight) for weight in weights]
            for num_rows in ROWS[:4] if report.quick else ROWS:
                row = measure(weights, layers, num_rows, rounds=3 if report.quick else 9)
                head: Row = {"layer": name, "dtype": dtype_name, "rows": num_rows, "limit": native.nf4_max_rows}
                rows.append(head | row)
                texts = [f"{way} {number(row[f'us_{way}']):.0f} µs" for way in WAYS]
                report.say(f"{name}, {dtype_name}, {num_rows} rows: {', '.join(texts)}")
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

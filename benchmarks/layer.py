"""One decoder layer's linear groups, base and adapters together: what adapters cost where they are added.

Twelve layers take turns. All groups together are 280 MB of weights and come from memory; one group alone may stay in a
large last-level cache (o: 25 MB), so read its row as a share of the whole, not as a figure of its own. half_dora: the
adapters of `distinct`, every second one with DoRA's factors; times_lora is against `distinct`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.common.arena import elements_per_layer, layered_adapters, random_numbers
from benchmarks.common.report import Report, Row, bars, legend_below, number, spread, target_line
from benchmarks.common.shapes import RANK, BenchShape, shape_for
from benchmarks.common.timing import Spread, Sweep, interleaved, ratio
from lora_kernels.lora.batch import LoraBatch, LoraGroup
from lora_kernels.lora.launcher import group_linear

ROWS = (8, 32)
CASES = ("bare", "one", "distinct", "half_dora", "library_bare")


@dataclass(frozen=True)
class Layers:
    """Every layer's weights and groups, an input per group, and the batch of each case (None: base only)."""

    weights: list[list[torch.Tensor]]
    groups: list[list[LoraGroup]]
    inputs: list[torch.Tensor]
    batches: dict[str, LoraBatch | None]

    def run(self, case: str, members: Sequence[int], layer: int) -> None:
        """These groups of one layer."""
        for index in members:
            x, weight = self.inputs[index], self.weights[layer][index]
            if case == "library_bare":
                linear(x, weight)
            else:
                group_linear(x, weight, None, self.batches[case], self.groups[layer][index])


def build(shape: BenchShape, num_rows: int) -> Layers:
    shapes = list(shape.groups.values())
    ranks = [RANK] * num_rows
    num_elements = shape.layers * elements_per_layer(shapes, ranks)
    num_factors = shape.layers * -(-num_rows // 2) * sum(sum(s.out_features) for s in shapes)
    factors = torch.rand(num_factors, generator=torch.Generator().manual_seed(1)) + 0.5
    arena = torch.cat([random_numbers(num_elements), factors.view(torch.bfloat16)])
    adapters, dora = (layered_adapters(shapes, ranks, arena, num_layers=shape.layers) for _ in range(2))
    place = num_elements
    for slot in range(0, num_rows, 2):
        places = []
        for group in (each for layer in dora.groups for each in layer):
            for row, out in zip(group.module_rows, group.out_features, strict=True):
                places.append((row, place))
                place += 2 * out
        dora.table.set_factors(slot, 0, places)
    slots = np.arange(num_rows, dtype=np.int32)
    weights = [
        [random_numbers(sum(s.out_features) * s.in_features).view(-1, s.in_features) for s in shapes]
        for _ in range(shape.layers)
    ]
    return Layers(
        weights,
        adapters.groups,
        [random_numbers(num_rows * s.in_features).view(num_rows, -1) * 50 for s in shapes],
        {
            "bare": None,
            "one": LoraBatch(adapters.table, np.zeros_like(slots)),
            "distinct": LoraBatch(adapters.table, slots),
            "half_dora": LoraBatch(dora.table, slots),
        },
    )


def measure(layers: Layers, names: Sequence[str], num_rows: int, *, rounds: int) -> list[Row]:
    """Results per group, and of all groups together."""
    parts = {name: [index] for index, name in enumerate(names)} | {"all": list(range(len(names)))}
    rows: list[Row] = []
    for part, members in parts.items():
        sweeps: dict[str, Callable[[], float]] = {
            case: Sweep(partial(layers.run, case, members), len(layers.groups), budget_s=0.05) for case in CASES
        }
        seconds = interleaved(sweeps, rounds=rounds)
        rows += [
            {
                "group": part,
                "rows": num_rows,
                "case": case,
                "adapters": {"one": 1, "distinct": num_rows, "half_dora": num_rows}.get(case, 0),
                **Spread.of([1e6 * value for value in seconds[case]]).columns("us"),
                **ratio(seconds[case], seconds["bare"]).columns("times_bare"),
                **ratio(seconds[case], seconds["distinct"]).columns("times_lora"),
            }
            for case in CASES
        ]
    return rows


def plot(report: Report, rows: Sequence[Row]) -> None:
    whole = {(row["rows"], row["case"]): number(row["times_bare"]) for row in rows if row["group"] == "all"}
    counts = list(dict.fromkeys(row["rows"] for row in rows))
    costs = ", ".join(f"{count} distinct adapters {whole[count, 'distinct']:.2f}" for count in counts)
    figure, panels = report.figure(
        f"One layer's linear groups, time against the bare base: {costs}", panels=len(counts), width_in=4.6
    )
    for axes, count in zip(panels, counts, strict=True):
        own = [row for row in rows if row["rows"] == count]
        series = {case: [spread(row, "times_bare") for row in own if row["case"] == case] for case in CASES[1:]}
        bars(axes, list(dict.fromkeys(str(row["group"]) for row in own)), series)
        axes.set(title=f"{count} rows")
        target_line(axes, 1.0, "bare base")
    panels[0].set_ylabel("time / time of the bare base")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    table: dict[str, list[str]] = {}
    for row in rows:
        label = f"{row['group']}, {row['rows']} rows"
        table.setdefault(label, []).append(f"{number(row['us']):.0f} ({number(row['times_bare']):.2f})")
    lines = [[label, *cells] for label, cells in table.items()]
    report.print_table("µs per layer (times the bare base)", ["group", *CASES], lines)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("layer", __doc__, arguments)
    shape = shape_for(quick=report.quick)
    rows: list[Row] = []
    for num_rows in ROWS:
        report.say(f"{num_rows} rows: building {shape.layers} layers and {num_rows} adapters")
        measured = measure(build(shape, num_rows), list(shape.groups), num_rows, rounds=3 if report.quick else 9)
        whole = {row["case"]: number(row["us"]) for row in measured if row["group"] == "all"}
        report.say(f"{num_rows} rows: " + ", ".join(f"{case} {us:.0f} µs" for case, us in whole.items()))
        rows += measured
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

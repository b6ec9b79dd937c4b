"""What oneDNN's kept primitives take and give: memory and time of prompts of random lengths, by how many it keeps.

A step is one layer's products at 65 to 512 rows, on one thread; each setting is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from benchmarks.common.report import Report, Row, bars, number, ranged, spread
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.op_linear import weight_shapes
from benchmarks.soaking.watch import ProcessSize
from lora_kernels.process import PRIMITIVE_CACHES

FEWEST_ROWS = 65  # fewer are ours if the machine has AVX512-BF16
MOST_ROWS = 512
SETTINGS = {
    "oneDNN's own": dict.fromkeys(PRIMITIVE_CACHES, "1024"),
    "ours": PRIMITIVE_CACHES,
    "a quarter of ours": {name: str(max(1, int(kept) // 4)) for name, kept in PRIMITIVE_CACHES.items()},
}


class Cost(NamedTuple):
    """ms: CPU time of a step. mb: what the process grew by."""

    ms: float
    mb: float


@torch.inference_mode()
def run_child(num_steps: int, *, quick: bool) -> None:
    """Prints a Cost as JSON; the first half of the steps is not timed."""
    torch.set_num_threads(1)
    weights = [torch.randn(shape).bfloat16() for shape in weight_shapes(shape_for(quick=quick)).values()]
    inputs = [torch.randn(MOST_ROWS, weight.shape[1]).bfloat16() for weight in weights]
    begin_mb, begin_s, dice = ProcessSize.of(os.getpid()).anon_mb, 0.0, random.Random(0)
    for index in range(2 * num_steps):
        if index == num_steps:
            begin_s = time.process_time()
        rows = dice.randint(FEWEST_ROWS, MOST_ROWS)
        for weight, x_TH in zip(weights, inputs, strict=True):
            linear(x_TH[:rows], weight)
    seconds = time.process_time() - begin_s
    print(json.dumps(Cost(1000 * seconds / num_steps, ProcessSize.of(os.getpid()).anon_mb - begin_mb)))


def measure(setting: str, num_steps: int, *, quick: bool) -> Cost:
    code = f"from benchmarks.op_primitives import run_child; run_child({num_steps}, quick={quick})"
    environment = {**os.environ, **SETTINGS[setting], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(*json.loads(done.stdout))


def rows_of(costs: dict[str, list[Cost]]) -> list[Row]:
    own_ms = [cost.ms for cost in costs["oneDNN's own"]]
    return [
        {
            "setting": setting,
            **Spread.of([cost.mb for cost in each]).columns("mb"),
            **Spread.of([cost.ms for cost in each]).columns("ms"),
            **ratio([cost.ms for cost in each], own_ms).columns("times_own"),
        }
        for setting, each in costs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("op_primitives", __doc__, arguments)
    num_steps, rounds = (4, 1) if report.quick else (400, 3)
    cases = {setting: partial(measure, setting, num_steps, quick=report.quick) for setting in SETTINGS}
    show = "{0.ms:.2f} ms a step, {0.mb:.0f} MB".format
    rows = rows_of(interleaved(cases, rounds=rounds, warmups=0, say=report.say, show=show))
    report.write_csv(rows)
    by_setting = {row["setting"]: row for row in rows}
    own, ours = by_setting["oneDNN's own"], by_setting["ours"]
    title = f"Kept primitives: {number(ours['mb']):.0f} MB instead of {number(own['mb']):.0f}, "
    title += f"{number(ours['times_own']):.2f} times the time of a prompt's step"
    figure, (memory, step) = report.figure(title, panels=2)
    bars(memory, list(SETTINGS), {"memory": [spread(row, "mb") for row in rows]})
    memory.set_title("growth of the process, MB")
    bars(step, list(SETTINGS), {"a step": [spread(row, "ms") for row in rows]}, first_colour=1)
    step.set_title("CPU time of a step of one layer, ms")
    report.save_plot(figure)
    columns = {"keeps": "{setting}", "MB": ranged("mb"), "ms a step": ranged("ms")}
    report.print_rows(title, rows, columns | {"times oneDNN's own": ranged("times_own")})


if __name__ == "__main__":
    main()

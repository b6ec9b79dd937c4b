"""Our training step against TRL's SFTTrainer: tokens per second and peak memory, same data, base, adapter and steps.

Each side trains in a process of its own, in turn, every other round backwards. "trl" has its defaults, but gradient
checkpointing is off on both sides; "trl-chunked" has its memory-saving loss. The losses are compared, too: in float32
both sides must have computed the same thing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.common.report import Report, Row
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.training.side import SIDES, SideResult

TO_REACH = 1.2  # ours / theirs in tokens per second; peak memory not above
PRECISIONS = ("float32", "bfloat16")


def run_side(module: str, side: str, *, precision: str, quick: bool) -> SideResult:
    """One side's run in a fresh process. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", module, side, "--precision", precision]
    command += ["--quick", "--steps", "4"] if quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return SideResult(**json.loads(done.stdout.splitlines()[-1]))


def row_of(precision: str, side: str, ours: Sequence[SideResult], theirs: Sequence[SideResult]) -> Row:
    speeds, peaks = (
        [[getattr(r, name) for r in runs] for runs in (ours, theirs)] for name in ("tokens_per_s", "peak_bytes")
    )
    differences = [abs(mine - other) for mine, other in zip(ours[0].losses, theirs[0].losses, strict=True)]
    return {
        "precision": precision,
        "against": side,
        **Spread.of(speeds[0]).columns("ours_tok_per_s"),
        **Spread.of(speeds[1]).columns("theirs_tok_per_s"),
        **ratio(*speeds).columns("ours_over_theirs"),
        "ours_peak_mib": max(peaks[0]) / 2**20,
        "theirs_peak_mib": max(peaks[1]) / 2**20,
        "largest_loss_difference": max(differences),
    }


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    columns = {
        "precision": "{precision}",
        "against": "{against}",
        "ours tok/s": "{ours_tok_per_s:.0f}",
        "theirs tok/s": "{theirs_tok_per_s:.0f}",
        "ratio": "{ours_over_theirs:.2f}",
        "ours MiB": "{ours_peak_mib:.0f}",
        "theirs MiB": "{theirs_peak_mib:.0f}",
        "loss differs": "{largest_loss_difference:.1g}",
        "to reach": f">= {TO_REACH}, peak not above",
    }
    report.print_rows("Training: ours against TRL, medians over rounds", rows, columns)


def compare(report: Report, module: str, sides: Sequence[str]) -> None:
    """The first of the sides against each of the others. module: runs one of them."""
    precisions = PRECISIONS[: 1 if report.quick else None]
    results = interleaved(
        {
            f"{precision}, {side}": partial(run_side, module, side, precision=precision, quick=report.quick)
            for precision in precisions
            for side in sides
        },
        rounds=1 if report.quick else 2,
        warmups=0,
        say=report.say,
        show=lambda result: f"{result.tokens_per_s:.0f} tok/s, {result.peak_bytes >> 20} MiB",
    )
    ours, *others = sides
    rows = [
        row_of(precision, side, results[f"{precision}, {ours}"], results[f"{precision}, {side}"])
        for precision in precisions
        for side in others
    ]
    report.write_csv(rows)
    print_summary(report, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("train_vs_trl", __doc__, arguments)
    compare(report, "benchmarks.training.side", SIDES)


if __name__ == "__main__":
    main()

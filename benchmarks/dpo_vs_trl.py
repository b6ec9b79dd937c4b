"""DPO on preference pairs against TRL's DPOTrainer: tokens per second, peak memory and the loss of every step.

Each side trains in a process of its own, in turn, on the same pairs from the same first adapter; in float32 both must
compute the same losses. The reference log-probabilities are computed in every step on both sides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.common.report import Report
from benchmarks.common.timing import interleaved
from benchmarks.train_vs_trl import PRECISIONS, print_summary, row_of
from benchmarks.training.dpo_side import SIDES
from benchmarks.training.side import SideResult


def run_side(side: str, *, precision: str, quick: bool) -> SideResult:
    """One side's run in a fresh process. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "benchmarks.training.dpo_side", side, "--precision", precision]
    command += ["--quick", "--steps", "4"] if quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return SideResult(**json.loads(done.stdout.splitlines()[-1]))


def cases(*, quick: bool) -> dict[str, Callable[[], SideResult]]:
    precisions = PRECISIONS[: 1 if quick else None]
    return {
        f"{each}, {side}": partial(run_side, side, precision=each, quick=quick) for each in precisions for side in SIDES
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("dpo_vs_trl", __doc__, arguments)
    results = interleaved(
        cases(quick=report.quick),
        rounds=1 if report.quick else 2,
        warmups=0,
        say=report.say,
        show=lambda result: f"{result.tokens_per_s:.0f} tok/s, {result.peak_bytes >> 20} MiB",
    )
    rows = [
        row_of(precision, "trl", results[f"{precision}, ours"], results[f"{precision}, trl"])
        for precision in PRECISIONS[: 1 if report.quick else None]
    ]
    report.write_csv(rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()

"""DPO on preference pairs against TRL's DPOTrainer: tokens per second, peak memory and the loss of every step.

Each side trains in a process of its own, in turn, on the same pairs from the same first adapter; in float32 both must
compute the same losses. The reference log-probabilities are computed in every step on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import Report
from benchmarks.train_vs_trl import compare
from benchmarks.training.dpo_side import SIDES


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("dpo_vs_trl", __doc__, arguments)
    compare(report, "benchmarks.training.dpo_side", SIDES)


if __name__ == "__main__":
    main()

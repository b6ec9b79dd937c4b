"""Ours against vLLM's CPU build, through HTTP: same base, adapters, prompts and client, in turn.

Installs vLLM by name into an environment of its own at the first use (build/peers; MULTILORA_BENCH_PEERS moves it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.report import Report
from benchmarks.common.shapes import BenchShape
from benchmarks.peers.comparison import compare
from benchmarks.peers.vllm import PACKAGE, Vllm
from lora_kernels.cgroups import usable_cpus


def peer(report: Report, shape: BenchShape, adapters: Sequence[Path], log: Path) -> Vllm:
    """Its settings: all cores, or all but one as it chooses itself; the base's bfloat16, or float32, which is faster on
    cores without instructions for the other."""
    cores = usable_cpus()
    all_cores, fewer = f"0-{cores - 1}", f"0-{max(0, cores - 2)}"
    settings = dict.fromkeys((f"{all_cores} bfloat16", f"{fewer} bfloat16", f"{all_cores} float32"))
    return Vllm(shape, adapters, log, tuple(settings), PACKAGE.installed(report.say))


def main(arguments: Sequence[str] | None = None) -> None:
    compare("versus_vllm", __doc__, peer, arguments, has_schemas=True)


if __name__ == "__main__":
    main()

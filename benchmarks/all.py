"""Runs every benchmark in order, from the op to the server, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.common.report import DEFAULT_OUT

NAMES = (
    "op_lora",
    "op_linear",
    "op_nf4",
    "op_primitives",
    "layer",
    "model_tax",
    "experts",
    "versus_peft",
    "paging",
    "server_load",
    "fairness",
    "structured_output",
    "activated_lora",
    "versus_vllm",
    "versus_llama_server",
    "prompt_lookup",
    "tenant_text",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that all of it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="some of them")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    began_s, failed = time.monotonic(), []
    for index, name in enumerate(options.only):
        elapsed_s = time.monotonic() - began_s
        console.rule(f"[{index + 1}/{len(options.only)}] {name}, {elapsed_s / 60:.1f} min so far", align="left")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(options.out)]
        if subprocess.run([*command, *(["--quick"] if options.quick else [])], check=False).returncode:
            failed.append(name)
    minutes = (time.monotonic() - began_s) / 60
    console.rule(f"{len(options.only) - len(failed)} of {len(options.only)} done in {minutes:.1f} min", align="left")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""The suite's parts: what each measures, how long it may take, and the file it leaves. A part that has one is done.

`python -m benchmarks.gpu.parts NAME ... --out DIR [--toy]` runs parts in this process; `gpu_suite` calls it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row


@dataclass(frozen=True, slots=True)
class Part:
    """run: module and function under `benchmarks.gpu`. seconds: allowed on a GPU, compiling included."""

    about: str
    module: str
    function: str
    seconds: int

    def load(self) -> Callable[[Bench], list[Row]]:
        function: Callable[[Bench], list[Row]] = getattr(
            importlib.import_module(f"benchmarks.gpu.{self.module}"), self.function
        )
        return function


PARTS = {
    "correctness": Part("all operations against their references", "correctness", "run", 200),
    "model": Part("8B shape in bf16: decode, prefill, paging", "model_part", "run_bf16", 120),
    "lora": Part("LoRA operations", "lora_part", "run", 90),
    "nf4": Part("NF4 matmul", "nf4_part", "run", 40),
    "model_nf4": Part("8B shape in NF4: decode", "model_part", "run_nf4", 60),
    "attention": Part("paged attention", "attention_part", "run", 50),
    "peft": Part("PEFT and transformers' generate", "peft_part", "run", 40),
    "others": Part("other projects' LoRA kernels beside ours", "others_part", "run", 120),
    "tune": Part("tiles that are not in the table", "tune", "run", 400),
}
USUAL = tuple(name for name in PARTS if name not in ("others", "tune"))


def file_of(out: Path, name: str, *, toy: bool) -> Path:
    return out / "parts" / f"{name}{'-toy' if toy else ''}.json"


def rows_file_of(out: Path, name: str, *, toy: bool) -> Path:
    """A line for each row, as soon as the part has it."""
    return file_of(out, name, toy=toy).with_suffix(".rows")


def result_of(out: Path, name: str, *, toy: bool) -> dict[str, Any] | None:
    """What a finished part left; the rows of one that was cut off, with `cut_off`; or None."""
    path, rows = file_of(out, name, toy=toy), rows_file_of(out, name, toy=toy)
    if path.is_file():
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded
    if not rows.is_file():
        return None
    whole = rows.read_text().rpartition("\n")[0]  # the last line may be half written
    return {"part": name, "cut_off": True, "rows": [json.loads(line) for line in whole.splitlines()]}


def run_part(name: str, out: Path, *, toy: bool, seconds: float, others: Sequence[Path] = ()) -> None:
    """Measure and write. A part that fails or is cut off leaves the rows it had."""
    part = PARTS[name]
    bench = Bench.here(toy=toy, seconds=seconds, others=others)
    rows_file_of(out, name, toy=toy).parent.mkdir(parents=True, exist_ok=True)
    with rows_file_of(out, name, toy=toy).open("w") as stream:
        bench.keep = lambda row: print(json.dumps(row), file=stream, flush=True)
        _measure(part, name, bench, file_of(out, name, toy=toy))
    rows_file_of(out, name, toy=toy).unlink()


def _measure(part: Part, name: str, bench: Bench, path: Path) -> None:
    began_s = time.monotonic()
    bench.say(f"{name}: {part.about}, on {bench.name}, which copies {bench.bandwidth / 1e9:.0f} GB/s")
    rows = part.load()(bench)
    result = {
        "part": name,
        "device": bench.name,
        "bandwidth_gb_per_s": bench.bandwidth / 1e9,
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": time.monotonic() - began_s,
        "rows": rows,
    }
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1))
    scratch.replace(path)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "transformers", "bitsandbytes", "peft"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "?"))
        except ImportError:
            found[name] = "missing"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--others", type=Path, nargs="*", default=())
    chosen = parser.parse_args(arguments)
    if chosen.toy and importlib.util.find_spec("triton") is not None:
        from benchmarks.common.quick_interpreter import quicken_interpreter

        quicken_interpreter()
    for name in chosen.names:
        run_part(name, chosen.out, toy=chosen.toy, seconds=chosen.seconds, others=chosen.others)


if __name__ == "__main__":
    main()

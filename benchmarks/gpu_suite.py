"""Everything that is to be known of one GPU, in one command and under nine minutes: correctness first, then speed.

Each part runs in a process of its own and leaves a file; what has one is not run again, so a suite that was cut off
resumes. `--toy` runs all of it on the CPU through Triton's interpreter: a check that it works.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.parts import PARTS, USUAL, file_of
from benchmarks.gpu.summary import plot, results, table, write, wrong_cases

DEFAULT_OUT = Path("benchmarks/results/gpu")
BUDGET_S = 525.0
MIN_PART_S = 15.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises SystemExit 1 if an operation is wrong or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where results go, and are found")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=[*USUAL], metavar="NAME")
    parser.add_argument("--toy", "--quick", action="store_true", help="toy sizes on the CPU: numbers mean nothing")
    parser.add_argument("--fresh", action="store_true", help="run parts again that are done")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="leave out what no time is left for")
    parser.add_argument("--others", type=_paths, default=[], metavar="PATH[,PATH]", help="checkouts of vLLM and SGLang")
    options = parser.parse_args(arguments)
    if options.others and "others" not in options.only:
        options.only.append("others")
    if "others" in options.only and not options.others:
        parser.error("--only others needs --others PATH[,PATH]")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = _run_all(options)
    found = results(options.out, toy=options.toy)
    plot(options.out, found, print)
    print(f"wrote {write(options.out, found, toy=options.toy)}")
    wrong = wrong_cases(found)
    for case in wrong:
        print(f"WRONG  {case}")
    print(table(found))
    if failed or wrong:
        raise SystemExit(f"failed: {', '.join([*failed, *(['correctness'] if wrong else [])])}")


def _paths(text: str) -> list[Path]:
    return [Path(part).expanduser().resolve() for part in text.split(",")]


def _run_all(options: argparse.Namespace) -> list[str]:
    """Names of those that failed."""
    deadline_s = time.monotonic() + options.budget_s
    left = [name for name in options.only if options.fresh or not file_of(options.out, name, toy=options.toy).is_file()]
    for name in options.only:
        if name not in left:
            print(f"{name}: done before")
    if options.toy:  # one process: importing torch seven times takes longer than all of it
        return left if left and not _run(left, options, deadline_s - time.monotonic()) else []
    failed = []
    for name in left:
        seconds = min(float(PARTS[name].seconds), deadline_s - time.monotonic())
        if seconds < MIN_PART_S:
            print(f"{name}: left out, no time is left; run the same command again")
        elif not _run([name], options, seconds):
            failed.append(name)
    return failed


def _run(names: Sequence[str], options: argparse.Namespace, seconds: float) -> bool:
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.parts", *names, "--out", str(options.out)]
    command += ["--seconds", str(0.9 * seconds), *(["--toy"] if options.toy else [])]
    command += ["--others", *map(str, options.others)] if "others" in names else []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if options.toy else {})}
    began_s = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        done = False
        print(f"{' '.join(names)}: stopped after {seconds:.0f} s")
    print(f"{' '.join(names)}: {'done' if done else 'FAILED'} in {time.monotonic() - began_s:.0f} s")
    return done


if __name__ == "__main__":
    main()

"""Makes `.rental`, what travels to a bare GPU machine beside the repository: wheels it lacks, and a Triton cache.

`python -m benchmarks.gpu.prepare_rental` with the machine's own versions of Python, torch and Triton (the cache's keys
hold Triton's version and each kernel's source). With another Triton the machine compiles for itself. Kernels come in
the order in which the first run launches them: a cache that is cut off (`--seconds`) holds what is needed first, and
the next call continues. `--resume gpu_suite.json`: parts that an earlier run has measured are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

Kernel = TypeVar("Kernel")

RENTAL = Path(".rental")
CONSTRAINTS = Path("constraints.txt")
NEEDED = ("sqlalchemy", "greenlet", "alembic", "mako", "google-re2", "llguidance", "bitsandbytes")
GLIBC = 39  # 2.39, the machine's: pip takes a wheel for an older one only if that one is named
PLATFORMS = (*(f"manylinux_2_{version}" for version in range(GLIBC, 4, -1)), "manylinux2014", "manylinux1")
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")  # of bitsandbytes' dozen
MAX_BYTES = 64 << 20
MAX_PROCESSES = 16
MOST_S = 3600.0  # of one part; what a process that is ended leaves out is not noticed
KERNELS_AT_ONCE = 24  # of one process, between two looks at the clock; it takes as long to start as about three


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prepare_rental", description=__doc__)
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    parser.add_argument("--no-wheels", action="store_true")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--processes", type=int, default=min(MAX_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no more kernels after that time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a gpu_suite.json whose parts are not run again")
    chosen = parser.parse_args(arguments)
    RENTAL.mkdir(exist_ok=True)
    if not chosen.no_wheels:
        download_wheels(RENTAL / "wheels", chosen.python)
    if not chosen.no_cache:
        compile_cache(RENTAL, chosen.processes, chosen.seconds)
    if chosen.resume is not None:
        resume(chosen.resume, RENTAL / "suite" / "parts")
    size = sum(path.stat().st_size for path in RENTAL.rglob("*") if path.is_file() and "cache" not in path.parts)
    print(f"{RENTAL}: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        raise SystemExit(f"{RENTAL} holds {size} bytes, more than {MAX_BYTES}")


def pinned(names: Sequence[str], constraints: str) -> list[str]:
    """`name==version` of each, as pinned. Raises ValueError for one that is not."""
    lines = {line.partition("==")[0].lower(): line.split()[0] for line in constraints.splitlines() if "==" in line}
    missing = [name for name in names if name not in lines]
    if missing:
        raise ValueError(f"constraints.txt pins no {', '.join(missing)}")
    return [lines[name] for name in names]


def download_wheels(folder: Path, python: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *pinned(NEEDED, CONSTRAINTS.read_text())], check=True)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        trim(wheel)


def trim(wheel: Path) -> None:
    """Leave out the shared libraries of other CUDA versions. pip installs what is left: it checks no list."""
    scratch = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if not item.filename.endswith(".so") or item.filename.endswith(LIBRARIES):
                new.writestr(item, old.read(item))
    scratch.replace(wheel)


def compile_cache(folder: Path, processes: int, seconds: float) -> None:
    """folder/triton.tgz: all kernels that the suite and a server of the 8B shape launch on an H200."""
    cache = (folder / "cache").resolve()
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from benchmarks.gpu.compile_for import H200, as_on, jobs_in_order_of_use
    from lora_kernels.triton_common.compile_ahead import compile_jobs

    ends_s = time.perf_counter() + seconds
    with as_on(H200):
        jobs = list({job.key: job for job in jobs_in_order_of_use()}.values())
    print(f"{len(jobs)} kernels are asked for", flush=True)
    left = in_parts(
        jobs,
        partial(compile_jobs, num_processes=processes, timeout_s=MOST_S),
        size=processes * KERNELS_AT_ONCE,
        has_time=lambda: time.perf_counter() < ends_s,
    )
    cache.mkdir(exist_ok=True)
    with tarfile.open(folder / "triton.tgz", "w:gz") as archive:
        archive.add(cache, arcname=".")
    num_compiled = sum(1 for _ in cache.rglob("*.cubin"))
    print(f"{num_compiled} kernels in {folder / 'triton.tgz'}" + (f", {left} to go: call again" if left else ""))


def in_parts(
    jobs: Sequence[Kernel],
    compile_all: Callable[[Sequence[Kernel]], Mapping[str, str]],
    *,
    size: int,
    has_time: Callable[[], bool],
    say: Callable[[str], None] = print,
) -> int:
    """Compile in the given order, `size` at once, while there is time; returns how many are left."""
    done = 0
    while done < len(jobs) and has_time():
        for name, why in compile_all(jobs[done : done + size]).items():
            say(f"{name} does not compile: {why}")
        done = min(done + size, len(jobs))
        say(f"{done} of {len(jobs)} kernels")
    return len(jobs) - done


def resume(measured: Path, folder: Path) -> None:
    """A file for each whole part of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in json.loads(measured.read_text()).items():
        if not result.get("cut_off"):
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Compiles kernels before their first launch, in several processes at once, into Triton's cache on disk.

A launcher decides from its inputs what is compiled. So the launchers run once with launching turned off, and what they
asked for is compiled elsewhere. When they run again, each kernel is read from the cache. Knows Triton; knows no kernel.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.runtime import driver

from lora_kernels.cgroups import usable_cpus

MAX_PROCESSES = 16
KERNELS_PER_PROCESS = 3  # a process takes as long to start as about this many kernels to compile
TIMEOUT_S = 300.0
WORKER = "lora_kernels.triton_common.compile_worker"


@dataclass(frozen=True)
class Job:
    """One compiled form of one kernel. target: backend, architecture, threads of a warp. key: what Triton knows it by.

    options: those with a plain value; Triton adds its own for the rest."""

    module: str
    name: str
    key: str
    target: tuple[str, int | str, int]
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """failures: kernel -> why it does not compile. They are compiled again, and fail, at their first launch."""

    num_kernels: int
    num_processes: int
    seconds: float
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The result in one line."""
        return f"{self.num_kernels} kernels in {self.seconds:.1f} s by {self.num_processes} processes"


def compile_ahead(launch_all: Callable[[], object], *, num_processes: int | None = None) -> Compiled:
    """Compile whatever `launch_all` would launch and this process has not launched yet. Nothing is launched."""
    began_s = time.perf_counter()
    jobs = asked_for(launch_all)
    wanted = num_processes or min(MAX_PROCESSES, usable_cpus(), -(-len(jobs) // KERNELS_PER_PROCESS))
    failures = compile_jobs(jobs, max(1, wanted)) if jobs else {}
    return Compiled(len(jobs), wanted if jobs else 0, time.perf_counter() - began_s, failures)


def asked_for(launch_all: Callable[[], object]) -> list[Job]:
    """What `launch_all` would launch and this process has not compiled yet, each once. Nothing is launched: what a
    kernel would have written is left as `empty` made it."""
    found: dict[str, Job] = {}
    with _launching_turned_off(lambda job: found.setdefault(job.key, job)):
        launch_all()
    return list(found.values())


@contextmanager
def _launching_turned_off(note: Callable[[Job], object]) -> Iterator[None]:
    before = triton.knobs.runtime.jit_cache_hook

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        note(_job(fn, compile))
        return True  # Triton takes it that another thread compiles, and does not launch

    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def _job(fn: Any, compile: dict[str, Any]) -> Job:
    options = json.loads(compile["specialization_data"])["options"]
    target = driver.active.get_current_target()
    return Job(
        module=fn.jit_function.fn.__module__,
        name=fn.jit_function.fn.__name__,
        key=f"{fn.module}.{fn.name} {compile['key']}",
        target=(target.backend, target.arch, target.warp_size),
        signature=dict(compile["signature"]),
        constants={place: getattr(value, "value", value) for place, value in compile["constants"].items()},
        attributes=dict(compile["configs"][0]),
        options={name: value for name, value in options.items() if isinstance(value, bool | int | str)},
    )


def compile_jobs(jobs: Sequence[Job], num_processes: int, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """Fill Triton's cache. Returns kernel -> failure. A process that ends early, or at its timeout, fails nothing: what
    it left out is compiled at its first launch."""
    shares = [jobs[start::num_processes] for start in range(min(num_processes, len(jobs)))]
    with ThreadPoolExecutor(len(shares)) as pool:
        results = list(pool.map(lambda share: _in_a_process(share, timeout_s), shares))
    return {name: why for result in results for name, why in result.items()}


def _in_a_process(jobs: Sequence[Job], timeout_s: float) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    try:
        done = subprocess.run(
            [sys.executable, "-m", WORKER],
            input=base64.b64encode(pickle.dumps(list(jobs))),
            env=environment,
            capture_output=True,
            timeout=timeout_s,
            check=True,
        )
        failures: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return {}
    return failures

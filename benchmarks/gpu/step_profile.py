"""Where a decode step's time goes: microseconds of each kernel of a recorded step, and what lies between them.

`python -m benchmarks.gpu.step_profile [--nf4] [--toy]`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.profiler import ProfilerActivity, profile

from adapters_store.base.description import AdapterDigest
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine_runs import engine_over, request, warm
from benchmarks.gpu.random_base import RandomAdapters, random_base
from benchmarks.gpu.sizes import Sizes, sizes_for
from server.engine.engine import Engine

STEPS = 10
CUDA = ".CUDA"  # how torch's device types end
SETTLE_STEPS = 25  # prompts are over and steps are launched ahead
SHOWN = 14
CASES = ((1, 0), (1, 1), (32, 0), (32, 32), (64, 0))  # rows, adapters
TOY_CASES = ((1, 0), (2, 2))


class Event(Protocol):
    """As much of torch's profiler events as is read here."""

    key: str
    count: int
    device_type: object
    self_device_time_total: float


@dataclass(frozen=True)
class StepProfile:
    """wall_us: of a step. kernels: (us, launches, name) of each kernel of a step, the longest first."""

    wall_us: float
    kernels: tuple[tuple[float, float, str], ...]

    @classmethod
    def of(cls, wall_us: float, events: Sequence[Event], *, steps: int) -> StepProfile:
        on_gpu = (event for event in events if str(event.device_type).endswith(CUDA))
        lines = [(event.self_device_time_total / steps, event.count / steps, event.key) for event in on_gpu]
        return cls(wall_us, tuple(sorted(lines, reverse=True)))

    def text(self, title: str) -> str:
        busy = sum(us for us, _, _ in self.kernels)
        launches = sum(count for _, count, _ in self.kernels)
        lines = [
            f"{title}: {self.wall_us:.0f} us a step, kernels {busy:.0f} us ({busy / self.wall_us:.0%}) "
            f"in {launches:.0f} launches"
        ]
        for us, count, name in self.kernels[:SHOWN]:
            lines.append(f"  {us:8.1f} us  {count:6.1f}x  {us / max(count, 1e-9):7.2f} us each  {name[:90]}")
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step_profile", description=__doc__)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU: no kernel is seen there")
    chosen = parser.parse_args(arguments)
    bench, sizes = Bench.here(toy=chosen.toy), sizes_for(toy=chosen.toy)
    base = random_base(sizes.model, bench.device, nf4=chosen.nf4)
    cases = TOY_CASES if chosen.toy else CASES
    most = max(adapters for _, adapters in cases)
    with tempfile.TemporaryDirectory() as folder:
        source = RandomAdapters(base, 16, file=Path(folder) / "adapter.bin")
        with engine_over(bench, base, source, sizes, pool_adapters=most + 2) as parts:
            digests = [source.digest(f"p{index}") for index in range(most)]
            warm(parts.engine, digests, vocab=sizes.model.vocab)
            for rows, adapters in cases:
                chosen_digests = [digests[index % adapters] if adapters else None for index in range(rows)]
                seen = profile_steps(parts.engine, bench, sizes, chosen_digests)
                bench.say(seen.text(f"{rows} rows, {adapters} adapters"))


def profile_steps(engine: Engine, bench: Bench, sizes: Sizes, digests: Sequence[AdapterDigest | None]) -> StepProfile:
    """Of a request for each digest, once all of them decode. They are stepped to their end afterwards."""
    for digest in digests:
        engine.add(request(sizes.prompt, SETTLE_STEPS + 3 * STEPS, digest, vocab=sizes.model.vocab))
    for _ in range(SETTLE_STEPS):
        engine.step()
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        began_s = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        bench.synchronize()
        wall_us = 1e6 * (time.perf_counter() - began_s) / STEPS
    while engine.scheduler.num_running:
        engine.step()
    return StepProfile.of(wall_us, seen.key_averages(), steps=STEPS)


if __name__ == "__main__":
    main()

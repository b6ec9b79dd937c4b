"""What every part of the GPU suite measures with: a device, its clock, and how fast it reads its memory.

On a GPU calls are recorded into a CUDA graph and replayed, so that the host's launches cost nothing, as they do in
service. On a CPU (toy sizes, Triton's interpreter) they are called, and their numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_kernels.triton_common.available import triton_switch

Row = dict[str, object]
Call = Callable[[], object]
ROUNDS = 5
TARGET_S = 0.02  # of one round of replays
COPY_BYTES = 2 << 30
WARM_UPS = 2


@dataclass
class Bench:
    """One process's device. say: one line of progress. keep: writes a row down at once, so that a part which is cut
    off leaves it. others: checkouts of other projects."""

    device: torch.device
    toy: bool
    say: Callable[[str], None] = print
    keep: Callable[[Row], None] = lambda row: None
    deadline_s: float = field(default_factory=lambda: time.monotonic() + 600)
    others: tuple[Path, ...] = ()
    _bandwidth: float | None = None

    @classmethod
    def here(cls, *, toy: bool, seconds: float = 600.0, others: Sequence[Path] = ()) -> Bench:
        """toy: on the CPU, all kernels through Triton's interpreter."""
        if toy:
            triton_switch().on_cpu = True
        elif not torch.cuda.is_available():
            raise SystemExit("no CUDA device: give --toy for a run on the CPU at toy sizes")
        device = torch.device("cpu" if toy else "cuda")
        return cls(device, toy, deadline_s=time.monotonic() + seconds, others=tuple(others))

    @property
    def name(self) -> str:
        return "Triton's interpreter on a CPU" if self.toy else torch.cuda.get_device_name(self.device)

    @property
    def seconds_left(self) -> float:
        return self.deadline_s - time.monotonic()

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a large copy, read and written both counted; measured once."""
        if self._bandwidth is None:
            source = torch.empty(4096 if self.toy else COPY_BYTES, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._bandwidth = 2 * source.numel() / self.seconds([lambda: target.copy_(source)])
        return self._bandwidth

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of one call: the median of a few rounds over all, each on data of its own, so that caches are cold."""
        return self._on_gpu(calls) if self.device.type == "cuda" else _on_cpu(calls)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Random numbers made on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(scale)

    def _on_gpu(self, calls: Sequence[Call]) -> float:
        replay = recorded(calls, self.device)
        once_s = _event_seconds(replay, 1)
        count = max(1, min(1000, int(TARGET_S / max(once_s, 1e-6))))
        return statistics.median(_event_seconds(replay, count) / count for _ in range(ROUNDS)) / len(calls)


def recorded(calls: Sequence[Call], device: torch.device) -> Call:
    """All calls as one CUDA graph; as they are if they cannot be recorded."""

    def run() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        print(f"not recorded, launches are counted: {str(error).partition(chr(10))[0]}")
        torch.cuda.synchronize(device)
        return run
    return graph.replay


def _event_seconds(call: Call, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cpu(calls: Sequence[Call]) -> float:
    began_s = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began_s) / len(calls)

"""Which devices could do a training run, cheapest first. Tries the whole table in ones, twos, fours and eights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from trainer.planner.gpus import GPUS, PRICES_AS_OF, Gpu
from trainer.planner.memory import GIB, MemoryNeed, Sharding, TrainingCase, memory_need
from trainer.planner.timing import RunTime, run_time

COUNTS = (1, 2, 4, 8)
RUNTIME_BYTES = GIB  # CUDA context and allocator gaps
DATA_SHARE = 2  # host memory for each byte of training data, while it is encoded (1.0 to 1.4 from then on)
PROCESS_BYTES = 768 << 20  # host memory of Python, torch and the tokenizer, before the first weight
FILL = 0.95  # of a device's memory that a plan may use


@dataclass(frozen=True)
class Option:
    """One way to run it that fits."""

    gpu: Gpu
    devices: int
    case: TrainingCase
    need: MemoryNeed
    time: RunTime


def options(
    case: TrainingCase,
    *,
    train_tokens: int,
    sequence_length: int,
    gpus: Iterable[Gpu] = tuple(GPUS.values()),
) -> list[Option]:
    """What fits, cheapest first; [] if nothing does. Recomputes activations only if they do not fit otherwise."""
    time = partial(run_time, train_tokens=train_tokens, sequence_length=sequence_length)
    found = [
        Option(gpu, count, fitting, memory_need(fitting), time(fitting, gpu))
        for gpu in gpus
        for count in COUNTS
        if (fitting := _first_that_fits(case, gpu, count)) is not None
    ]
    return sorted(found, key=lambda option: (option.time.usd, option.time.hours))


def fewest_devices(found: Iterable[Option]) -> list[Option]:
    """The fewest devices of each kind that fit, cheapest first. More devices cost the same and take less time."""
    fewest = {option.gpu.name: option for option in sorted(found, key=lambda option: -option.devices)}
    return sorted(fewest.values(), key=lambda option: option.time.usd)


def prices_said() -> str:
    return f"prices are rough on-demand rates of {PRICES_AS_OF}: give your own with --gpu and --usd-per-hour"


def _first_that_fits(case: TrainingCase, gpu: Gpu, count: int) -> TrainingCase | None:
    for tried in _ways(case, count):
        if memory_need(tried).total <= FILL * gpu.memory_bytes:
            return tried
    return None


def _ways(case: TrainingCase, count: int) -> Iterator[TrainingCase]:
    """From the least effort to the most."""
    case = replace(case, runtime_bytes=RUNTIME_BYTES)
    if count > 1 and case.method == "dora":
        return  # it needs whole weights
    stages = (0,) if count == 1 else (2, 3)  # FSDP without resharding after the forward, and with
    for stage in stages:
        shared = replace(case, sharding=Sharding(stage, count))
        yield shared
        if not case.checkpointing:
            yield replace(shared, checkpointing=True)

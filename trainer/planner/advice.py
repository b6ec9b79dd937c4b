"""The changes to a training spec that make it fit: one line each, with the resulting bytes.

For refusals: "out of memory" with a way out. Knows specs and sums; starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trainer.planner.hardware import COUNTS, DATA_SHARE, PROCESS_BYTES
from trainer.planner.memory import GIB, OPTIMIZER_STATES, MemoryNeed, Sharding, TrainingCase, memory_need
from trainer.planner.shapes import ModelShape, shape_of_config
from trainer.spec import SpecError, TrainSpec

SMALL_FORWARDS = (8192, 4096, 2048, 1024, 512, 256)  # tokens


def case_of(
    spec: TrainSpec, *, shape: ModelShape | None = None, devices: int = 1, runtime_bytes: int = 0
) -> TrainingCase:
    """The planner's view of a spec. shape: read from spec.base if it is None. Raises PlanError for an unknown base.

    devices: the processes a sharded run is started with. runtime_bytes: what each takes before the first weight.
    """
    stage = 3 if spec.reshard_after_forward else 2
    targets = None if spec.adapter.target_modules == "all-linear" else tuple(spec.adapter.target_modules)
    return TrainingCase(
        shape=shape or shape_of_config(spec.base),
        method=spec.method,
        precision=spec.precision,
        tokens=spec.batch.forward_tokens,
        checkpointing=spec.checkpointing,
        rank=spec.adapter.rank,
        targets=targets,
        rank_pattern={key.rpartition(".")[2]: rank for key, rank in spec.adapter.rank_pattern.items()},
        optimizer_state=OPTIMIZER_STATES["trainer-8bit" if spec.optim.moments == "8bit" else "trainer"],
        sharding=Sharding(stage, devices) if spec.sharding == "fsdp" else Sharding(),
        runtime_bytes=runtime_bytes,
    )


def process_bytes(spec: TrainSpec) -> int:
    """Host memory of a run before the first weight: the process, and its encoded data at the fullest moment."""
    files = (spec.data, spec.validation, spec.mix)
    return PROCESS_BYTES + DATA_SHARE * sum(file.stat().st_size for file in files if file is not None and file.exists())


def advise(
    spec: TrainSpec,
    available_bytes: int,
    *,
    shape: ModelShape | None = None,
    devices: int = 1,
    runtime_bytes: int = 0,
) -> list[str]:
    """Lines for a person: the need, then every single change that makes the run fit `available_bytes` a device.

    If no single change is enough, all of them together; [] if the run fits as it is. Raises PlanError.
    """
    case = case_of(spec, shape=shape, devices=devices, runtime_bytes=runtime_bytes)
    need = memory_need(case)
    if need.total <= available_bytes:
        return []
    lines = [f"the run needs about {_gib(need.total)} a device, {_gib(available_bytes)} are available: {_parts(need)}"]
    fitting = list(_changes(spec, case, available_bytes))
    return lines + (fitting or list(_last_resort(spec, case, available_bytes)))


def _changes(spec: TrainSpec, case: TrainingCase, available: int) -> Iterator[str]:
    """The single changes that fit, the ones that cost least first."""

    def fits(change: str, **fields: Any) -> Iterator[str]:
        total = memory_need(replace(case, **fields)).total
        if total <= available:
            yield f"{change}: {_gib(total)}"

    for tokens in (tokens for tokens in SMALL_FORWARDS if tokens < case.tokens):
        change = f"batch.micro_tokens {tokens} instead of {case.tokens} (with max_sequence_length no longer than that)"
        if found := list(fits(change, tokens=tokens)):
            yield from found
            break
    if not case.checkpointing:
        yield from fits("checkpointing true (about a third slower)", checkpointing=True)
    if case.precision == "float32":
        yield from fits("precision bfloat16", precision="bfloat16")
    if case.method == "full":
        yield from fits("method lora", method="lora")
    if case.method != "qlora":
        yield from fits("method qlora", method="qlora")
    yield from _shared(spec, case, available)


def _shared(spec: TrainSpec, case: TrainingCase, available: int) -> Iterator[str]:
    """The fewest devices that fit, if the spec can be sharded at all."""
    try:
        TrainSpec.model_validate({**spec.model_dump(), "method": case.method, "sharding": "fsdp"})
    except SpecError:
        return
    for count in COUNTS:
        if count > case.sharding.devices:
            total = memory_need(replace(case, sharding=Sharding(3, count))).total
            if total <= available:
                yield f"sharding fsdp on {count} devices: {_gib(total)} each"
                break


def _last_resort(spec: TrainSpec, case: TrainingCase, available: int) -> Iterator[str]:
    smallest = replace(
        case, method="qlora", precision="bfloat16", checkpointing=True, tokens=min(case.tokens, SMALL_FORWARDS[-1])
    )
    total = memory_need(smallest).total
    together = f"qlora, checkpointing and micro_tokens {smallest.tokens} together: {_gib(total)}"
    if total <= available:
        yield f"no single change is enough; {together}"
        return
    shared = next(_shared(spec, smallest, available), "a smaller base is needed")
    yield f"no change of the method is enough ({together}); {shared}"


def _parts(need: MemoryNeed) -> str:
    return ", ".join(f"{line.name} {_gib(line.num_bytes)}" for line in need.lines if line.num_bytes * 20 > need.total)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / (1 << 20):.0f} MiB"

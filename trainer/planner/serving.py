"""How many adapters one server holds beside its base and its keys and values. Knows bytes; knows no requests.

The server keeps each adapter at its own rank in one arena (no slot is padded), so adapters divide what is left by their
own bytes. The host tier holds the rest; a cold adapter costs one copy to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planner.memory import GB, MemoryLine
from trainer.planner.shapes import ModelShape, PlanError, bytes_of

PCIE_BYTES_PER_S = 25e9  # about the measured rate of a x16 Gen4 slot; Gen5 doubles it


@dataclass(frozen=True, kw_only=True)
class ServingCase:
    """One server. reserve_bytes: everything beside base, stated keys and values, and adapters (runtime, activations).

    kv_tokens: tokens of all sequences in flight. adapter_bytes: of one adapter; None: rank on `targets`.
    """

    shape: ModelShape
    device_bytes: int
    reserve_bytes: int = 2 * GB
    kv_tokens: int = 0
    host_bytes: int = 16 * GB
    precision: str = "bfloat16"
    nf4: bool = False
    adapter_bytes: int | None = None
    rank: int = 16
    targets: tuple[str, ...] | None = None

    @property
    def one_adapter(self) -> int:
        """Bytes of one adapter on the device."""
        if self.adapter_bytes is not None:
            return self.adapter_bytes
        return self.shape.adapter_parameters(self.rank, self.targets) * bytes_of(self.precision)


@dataclass(frozen=True)
class ServingNeed:
    """adapters_on_device: resident at once, each batch may use all. adapters_in_host: ready within one copy."""

    lines: tuple[MemoryLine, ...]
    adapters_on_device: int
    adapters_in_host: int
    load_s: float
    assumptions: tuple[str, ...]


def adapters_per_server(case: ServingCase) -> ServingNeed:
    """Raises PlanError if the base and what is reserved do not fit, with the figures."""
    base = case.shape.weight_bytes(case.precision, nf4=case.nf4)
    kv, each = case.shape.kv_bytes(case.kv_tokens, case.precision), case.one_adapter
    left = case.device_bytes - base - kv - case.reserve_bytes
    if each < 1:
        raise PlanError("adapter_bytes", f"adapter_bytes must be at least 1, got {each}")
    if left < 0:
        held = f"base {base / GB:.1f} GB + keys and values {kv / GB:.1f} GB + reserve {case.reserve_bytes / GB:.1f} GB"
        raise PlanError("device", f"{held} exceed the device's {case.device_bytes / GB:.1f} GB; {_cure(case)}")
    kind = "NF4 linear layers at 4.127 bits, the rest " if case.nf4 else ""
    lines = (
        MemoryLine("base", base, f"{case.shape.parameters:,} parameters, {kind}{case.precision}"),
        MemoryLine("keys and values", kv, f"{case.kv_tokens:,} tokens x {case.shape.kv_bytes(1, case.precision):,}"),
        MemoryLine("reserve", case.reserve_bytes, "as given: runtime, activations, keys and values not counted above"),
        MemoryLine("adapters", left, f"{left // each:,} x {each:,}"),
    )
    return ServingNeed(lines, left // each, case.host_bytes // each, each / PCIE_BYTES_PER_S, _assumptions(case, each))


def _cure(case: ServingCase) -> str:
    if case.nf4:
        return "take a larger device, or shorter and fewer sequences"
    nf4 = case.shape.weight_bytes(case.precision, nf4=True)
    return f"--nf4 brings the base to {nf4 / GB:.1f} GB"


def _assumptions(case: ServingCase, each: int) -> tuple[str, ...]:
    named = "all linear layers" if case.targets is None else ", ".join(case.targets)
    adapter = "as given" if case.adapter_bytes is not None else f"rank {case.rank} on {named}, {case.precision}"
    return (
        *case.shape.assumptions,
        f"one adapter: {each:,} bytes ({adapter}), at its own rank without padding",
        f"host to device at {PCIE_BYTES_PER_S / 1e9:.0f} GB/s",
    )

"""How long a kernel should take on a GPU that is not here, so that tiles can be ranked before there is one.

A kernel takes as long as the slower of two: moving its bytes, and issuing its instructions. Bytes move at full
bandwidth only if a multiprocessor has enough of them in flight; its tile's registers and shared memory bound that.
Each launch adds a gap. `DeviceRates` holds the three constants that a first profile is to correct. Instructions and
bytes in flight are those of the machine code (`tests/kernels/triton/test_machine_code.py` compares).
"""

from __future__ import annotations

from dataclasses import dataclass

ISSUES_PER_CYCLE = 4
LANES = 32


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """bytes_per_s: of a long copy. full_in_flight: bytes that a multiprocessor must have in flight for it.
    gap_s: from a kernel's end to the next one's start in a recorded step. The other two are from the data sheet."""

    name: str
    bytes_per_s: float
    full_in_flight: float
    gap_s: float
    multiprocessors: int
    clock_hz: float


# Copy bandwidth measured elsewhere on an H200; bytes in flight: bandwidth times 1.2 us of latency, by multiprocessor.
H200 = DeviceRates("H200", 4.3e12, 40 * 1024, 2.0e-6, 132, 1.75e9)


@dataclass(frozen=True, slots=True)
class KernelCode:
    """What machine code says. in_flight: bytes of all resident programs of a multiprocessor. per_weight: instructions
    times lanes for each weight read; 0: bytes alone count."""

    in_flight: int
    per_weight: float = 0.0


# sm_90, Triton 3.9 and 3.6. A library's matrix product of few rows is taken to reach nine tenths of a copy.
CODE = {
    "linear": KernelCode(36 * 1024),
    "nf4": KernelCode(90 * 1024, per_weight=6.6),
    "shrink r16": KernelCode(192 * 1024),
    "shrink r64": KernelCode(180 * 1024),
    "expand r16": KernelCode(32 * 1024),
    "expand r64": KernelCode(64 * 1024),
    "attention": KernelCode(64 * 1024),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """One launch. num_weights: those that its instructions are counted for."""

    code: str
    num_bytes: float
    num_weights: float = 0.0
    launches: int = 1

    def seconds(self, rates: DeviceRates) -> float:
        code = CODE[self.code]
        moving = self.num_bytes / (rates.bytes_per_s * min(1.0, code.in_flight / rates.full_in_flight))
        issued = self.num_weights * code.per_weight / LANES
        issuing = issued / (ISSUES_PER_CYCLE * rates.multiprocessors * rates.clock_hz)
        return max(moving, issuing) + self.launches * rates.gap_s

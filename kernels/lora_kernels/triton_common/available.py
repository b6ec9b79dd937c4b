"""Decides which tensors and operations go to Triton. Imports nothing of it, and knows no kernel.

An operation can be turned off for the process: by `MULTILORA_TORCH_OPS=lora,attention`, or because its self-test failed
on this device. Its plain torch form then serves, slower.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Literal, get_args

import torch

Op = Literal["lora", "attention", "nf4", "elementwise"]
OPS: tuple[Op, ...] = get_args(Op)
ENVIRONMENT = "MULTILORA_TORCH_OPS"


@dataclass(slots=True)
class TritonSwitch:
    """on_cpu: CPU tensors too go to Triton, which only its interpreter can run (tests and toy benchmarks)."""

    on_cpu: bool = False
    _off: dict[Op, str] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> TritonSwitch:
        """`lora,nf4`: those operations off. ValueError for a name that is none."""
        switch = cls()
        for name in filter(None, (part.strip() for part in text.split(","))):
            known = next((op for op in OPS if op == name), None)
            if known is None:
                raise ValueError(f"{ENVIRONMENT} must name operations among {', '.join(OPS)}, got {name!r}")
            switch.turn_off(known, f"{ENVIRONMENT} says so")
        return switch

    @property
    def off(self) -> Mapping[Op, str]:
        """Operations that torch serves, and why."""
        return MappingProxyType(self._off)

    def turn_off(self, op: Op, why: str) -> None:
        self._off.setdefault(op, why)

    def turn_on(self, op: Op) -> None:
        self._off.pop(op, None)


@cache
def triton_switch() -> TritonSwitch:
    """The process's own."""
    return TritonSwitch.from_text(os.environ.get(ENVIRONMENT, ""))


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton(x: torch.Tensor, op: Op) -> bool:
    """True for CUDA tensors where Triton is installed and the operation is on; everything else keeps its own path."""
    switch = triton_switch()
    return (x.is_cuda or switch.on_cpu) and has_triton() and op not in switch.off

"""Decides which tensors and operations run on Triton. Does not import Triton; knows no kernel.

An operation can be turned off for the process: by `MULTILORA_TORCH_OPS=lora,attention`, or because its self-test failed
on this device. Plain torch then serves it, slower.
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
    """on_cpu: CPU tensors run on Triton too, which only its interpreter can do (tests and toy benchmarks)."""

    on_cpu: bool = False
    _off: dict[Op, str] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str) -> TritonSwitch:
        """`lora,nf4`: those operations off. Raises ValueError for an unknown name."""
        switch = cls()
        for name in filter(None, (part.strip() for part in text.split(","))):
            known = next((op for op in OPS if op == name), None)
            if known is None:
                raise ValueError(f"{ENVIRONMENT} must name operations among {', '.join(OPS)}, got {name!r}")
            switch.turn_off(known, f"turned off by {ENVIRONMENT}")
        return switch

    @property
    def off(self) -> Mapping[Op, str]:
        """Operations that torch serves, with the reason."""
        return MappingProxyType(self._off)

    def turn_off(self, op: Op, why: str) -> None:
        self._off.setdefault(op, why)


@cache
def triton_switch() -> TritonSwitch:
    """The switch of this process."""
    return TritonSwitch.from_text(os.environ.get(ENVIRONMENT, ""))


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton(x: torch.Tensor, op: Op) -> bool:
    """True for CUDA tensors if Triton is installed and the operation is on; all other tensors keep their own path."""
    switch = triton_switch()
    return (x.is_cuda or switch.on_cpu) and has_triton() and op not in switch.off

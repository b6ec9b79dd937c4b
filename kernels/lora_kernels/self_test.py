"""Runs every operation on the device against its reference before its first use, and turns off those that are wrong.

Knows which cases to run in about a second; `check_cases` knows how to run one.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from lora_kernels.attention.batch import AttentionRule
from lora_kernels.check_cases import (
    Outcome,
    add_norm_case,
    attention_case,
    gate_case,
    lora_case,
    nf4_case,
    norm_case,
    rope_case,
)
from lora_kernels.lora.batch import NO_ADAPTER, LoraGroup
from lora_kernels.triton_common.available import OPS, Op, has_triton, triton_switch

RANKS = (16, 1, 3, 8, 64, 256)
GROUP = LoraGroup((0, 1, 2), 512, (256, 64, 72))
Case = Callable[[], Outcome]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpCheck:
    """outcome None: the case raised `failure`."""

    op: Op
    case: str
    outcome: Outcome | None
    failure: str = ""

    @property
    def is_ok(self) -> bool:
        return self.outcome is not None and self.outcome.is_ok

    @property
    def text(self) -> str:
        """The result in one line."""
        if self.outcome is None:
            return f"{self.op} ({self.case}): {self.failure}"
        return f"{self.op} ({self.case}): error {self.outcome.error:.2g}, at most {self.outcome.limit:.2g}"


@cache
def check_before_use(device: torch.device, dtype: torch.dtype) -> None:
    """Once in a process: compile what the self-test launches, run it, and let torch serve what fails. Whatever is about
    to use a kernel on a model calls this first. Logs a line for each failure; on a CPU it does nothing.
    """
    if device.type != "cuda" or not has_triton():
        return
    from lora_kernels.triton_common.compile_ahead import compile_ahead

    compiled = compile_ahead(partial(self_test, device, dtype))
    if compiled.num_kernels:
        _log.info("%s for the self-test", compiled.text)
    for line in turn_off_failing(self_test(device, dtype)):
        _log.warning("%s; torch serves instead, slower", line)


def self_test(device: torch.device, dtype: torch.dtype = torch.bfloat16, ops: Sequence[Op] = OPS) -> list[OpCheck]:
    """Each operation's cases, in about a second once the kernels are compiled."""
    return [_checked(op, name, case) for op in ops for name, case in _cases(op, dtype, device)]


def turn_off_failing(checks: Sequence[OpCheck]) -> list[str]:
    """Let torch serve the operations that failed, for the rest of the process. Returns a line for each."""
    failed = [check for check in checks if not check.is_ok]
    for check in failed:
        triton_switch().turn_off(check.op, check.text)
    return [check.text for check in failed]


def turn_off_uncompiled(failures: Mapping[str, str]) -> list[str]:
    """failures: kernel -> why it does not compile. Returns a line for each operation that torch serves from now on."""
    return [
        _turned_off(op, f"{name} does not compile: {why}")
        for name, why in failures.items()
        if (op := op_of(name)) is not None and op not in triton_switch().off
    ]


def with_failing_ops_off(launch_all: Callable[[], object]) -> list[str]:
    """Call `launch_all`, again if a launch fails, with that operation served by torch. Returns a line for each.

    Raises what is not a launch's own failure: out of memory, a device that answers nothing any more."""
    lines: list[str] = []
    while True:
        try:
            launch_all()
        except Exception as error:
            op = _launched_by(error)
            if op is None or op in triton_switch().off:
                raise
            lines.append(_turned_off(op, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        else:
            return lines


def op_of(module: str) -> Op | None:
    """`lora_kernels.attention.flash_paged` -> attention."""
    parts = module.split(".")
    return next((op for op in OPS if parts[:2] == ["lora_kernels", op]), None)


def _launched_by(error: BaseException) -> Op | None:
    """The operation whose launch raised this; None: it was raised elsewhere, or concerns the whole device."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return None
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not modules or not modules[-1].startswith("triton."):
        return None
    return next((op for module in reversed(modules) if (op := op_of(module)) is not None), None)


def _turned_off(op: Op, why: str) -> str:
    triton_switch().turn_off(op, why)
    return f"{op}: {why}; torch serves instead, slower"


def _checked(op: Op, name: str, case: Case) -> OpCheck:
    try:
        return OpCheck(op, name, case())
    except Exception as error:  # noqa: BLE001  a compiler, driver or device may raise anything: torch serves instead
        return OpCheck(op, name, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _cases(op: Op, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Case]]:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if op == "lora":
        mixed = np.array([0, 1, 2, 3, 4, 5, NO_ADAPTER, 0, 5], dtype=np.int32)
        yield "decode, ranks 1 to 256", lambda: lora_case(GROUP, RANKS, mixed, special=True, **options)
        yield "decode, rank 16", lambda: lora_case(GROUP, (16, 8), mixed[:1].repeat(5), **options)
        long = np.repeat([1, NO_ADAPTER, 0], [70, 3, 60]).astype(np.int32)
        yield "prefill, ranks 8 and 16", lambda: lora_case(GROUP, (16, 8), long, special=True, **options)
        yield "prefill, rank 256", lambda: lora_case(GROUP, (256, 8), long, **options)
    elif op == "attention":
        chunks = [(1, 1), (1, 700), (90, 90), (40, 300)]
        yield "decodes and chunks", lambda: attention_case(128, (8, 2), chunks, **options)
        rule = AttentionRule(0.1, window=40, softcap=20.0)
        rotated = {**options, "is_rotated": True}
        yield "rotated while storing", lambda: attention_case(128, (8, 2), chunks, **rotated)
        yield "window and cap", lambda: attention_case(64, (4, 4), chunks, rule=rule, **options)
    elif op == "nf4" and dtype is not torch.float32:
        yield "1 row", lambda: nf4_case(1, 130, 1088, **options)
        yield "33 rows", lambda: nf4_case(33, 64, 256, nested=False, **options)
    elif op == "elementwise":
        yield "RMSNorm", lambda: norm_case(5, 500, **options)
        yield "sum and RMSNorm", lambda: add_norm_case(5, 500, **options)
        yield "sum and Gemma's RMSNorm", lambda: add_norm_case(5, 500, one_plus=True, **options)
        yield "SwiGLU", lambda: gate_case(3, 1100, **options)
        yield "RoPE", lambda: rope_case(5, 3, 128, **options)

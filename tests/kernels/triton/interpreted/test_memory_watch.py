"""The watch over interpreted kernels finds planted faults, and nothing in a kernel without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from support.kernels.memory_watch import MemoryWatch

BLOCK, PROGRAMS = 4, 8


@triton.jit
def right_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n, mask=n < count, other=0.0) + 1.0, mask=n < count)


@triton.jit
def unmasked_load_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n) + 1.0, mask=n < count)


@triton.jit
def unmasked_store_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n, mask=n < count, other=0.0))


@triton.jit
def one_cell_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def neighbour_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(out_ptr + n - BLOCK, mask=(n >= BLOCK) & (n < count), other=0.0)
    tl.store(out_ptr + n, before + 1.0, mask=n < count)


@triton.jit
def twice_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n // 2, n.to(tl.float32), mask=n < count)


@triton.jit
def reread_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n, n.to(tl.float32), mask=n < count)
    turned = tl.load(out_ptr + n // BLOCK * BLOCK + (n + 1) % BLOCK, mask=n < count - BLOCK, other=0.0)
    tl.store(out_ptr + n, turned, mask=n < 0)


def run(kernel: Any, count: int = BLOCK * PROGRAMS - 1) -> torch.Tensor:
    out = torch.zeros(count)
    kernel[(PROGRAMS,)](out, torch.arange(count).float(), count, BLOCK=BLOCK)
    return out


def test_a_right_kernel_is_right_in_any_order(memory_watch: MemoryWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    whose_turn = memory_watch.next_program

    def noted(x: int, y: int, z: int) -> tuple[int, int, int]:
        turns.append(whose_turn(x, y, z)[0])
        return turns[-1], 0, 0

    monkeypatch.setattr(memory_watch, "next_program", noted)
    assert run(right_kernel).tolist() == list(range(1, BLOCK * PROGRAMS))
    assert sorted(turns) == list(range(PROGRAMS))
    assert turns != sorted(turns)
    assert (memory_watch.num_launches, memory_watch.num_programs) == (1, PROGRAMS)
    assert memory_watch.findings == []


@pytest.mark.parametrize(
    ("kernel", "verb"), [(unmasked_load_kernel, "reads"), (unmasked_store_kernel, "writes")], ids=["load", "store"]
)
def test_memory_beyond_the_arguments_is_never_touched(memory_watch: MemoryWatch, kernel: Any, verb: str) -> None:
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match=f"{verb} outside its arguments"):
        run(kernel)
    assert memory_watch.take() == [f"{kernel.fn.__name__}: a program {verb} outside its arguments"]


FAULTS: list[tuple[Callable[..., Any], str]] = [
    (one_cell_kernel, "two programs write one address"),
    (neighbour_kernel, "a program reads what another writes"),
    (twice_kernel, "one store writes an address twice"),
    (reread_kernel, "a program reads what it has stored"),
]


@pytest.mark.parametrize(("kernel", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_planted_race_is_found(memory_watch: MemoryWatch, kernel: Any, fault: str) -> None:
    run(kernel)
    assert memory_watch.take() == [f"{kernel.fn.__name__}: {fault}"]


def test_a_view_may_not_read_beyond_its_storage(memory_watch: MemoryWatch) -> None:
    """The bounds are those of the memory behind an argument: a launcher may pass one row of a larger tensor."""
    whole = torch.zeros(3, BLOCK * PROGRAMS)
    right_kernel[(PROGRAMS,)](whole[1], whole[0], BLOCK * PROGRAMS, BLOCK=BLOCK)
    assert memory_watch.findings == []
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="outside"):
        right_kernel[(PROGRAMS,)](whole[1], whole[2], 2 * BLOCK * PROGRAMS, BLOCK=2 * BLOCK)
    memory_watch.take()


def test_memory_that_nothing_wrote_is_nan() -> None:
    assert torch.empty(100).isnan().all()

"""Records what a function computes on a CPU, C kernels and torch's functions, and does it again, the kernels from C.

Between two kernels Python takes 10 to 30 us, a quarter of a decode step of a small base, and it waits for the
interpreter's lock, which threads that answer HTTP hold meanwhile. A replay needs neither.

A recorded function reads its arguments where they lay, so the caller writes new values there. Every tensor that it
makes gets memory that all tapes share: one is replayed at a time, and a result is valid until the next replay. Memory
is given back when a tensor dies while it is recorded, so a later tensor can have it, as without a tape.
"""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lora_kernels.native.bindings import CKernelCall, NativeKernel, recording

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.new_empty.default, _aten.empty_like.default, _aten.empty.memory_format}
_VARYING = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_ALIGN_BYTES = 64
_MOST_OVERSIZE = 4  # a free piece this many times as large is taken, and no larger one


class NotRecordable(Exception):
    """What the function does cannot be done again without it."""


class TapeMemory:
    """Memory for all tensors of tapes that share it, in pieces whose sizes are powers of two. Whatever numbers of rows
    the tapes have, it is at most about four times what the largest needs. For one thread at a time."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []  # the smallest first
        self._pieces: dict[int, NDArray[np.uint8]] = {}  # by address
        self.num_live = 0

    @property
    def num_bytes(self) -> int:
        return sum(len(piece) for piece in self._pieces.values())

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of the same shape, strides and dtype. Its memory is free when its storage dies."""
        spans = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        num_bytes = (1 + sum(spans)) * tensor.element_size() if tensor.numel() else 1
        piece = self._take(num_bytes)
        held = piece[:]  # what the tensor keeps; another array than `piece`, so that it dies with the tensor
        weakref.finalize(held, self._give_back, piece).atexit = False
        return _tensor_on(held, tensor, 0)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, without keeping the memory from others. A tensor that lies elsewhere is returned."""
        piece = self._pieces.get(tensor.untyped_storage().data_ptr())
        return tensor if piece is None else _tensor_on(piece, tensor, int(tensor.storage_offset()))

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pieces

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        self.num_live += 1
        size = max(_ALIGN_BYTES, 1 << (num_bytes - 1).bit_length())
        index = bisect_left(self._free, size, key=len)
        if index < len(self._free) and len(self._free[index]) <= _MOST_OVERSIZE * size:
            return self._free.pop(index)
        room = np.empty(size + _ALIGN_BYTES, dtype=np.uint8)
        first = -room.ctypes.data % _ALIGN_BYTES
        piece = room[first : first + size]
        self._pieces[piece.ctypes.data] = piece
        return piece

    def _give_back(self, piece: NDArray[np.uint8]) -> None:
        self.num_live -= 1
        insort(self._free, piece, key=len)


def _tensor_on(memory: NDArray[np.uint8], like: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.from_numpy(memory).view(like.dtype).as_strided(like.shape, like.stride(), offset)


class Tape:
    """What a function did, to be done again. result: the tensor that it returned, where each replay writes it."""

    def __init__(self, run: Callable[[], torch.Tensor], memory: TapeMemory, lasting: Iterable[torch.Tensor]) -> None:
        """Calls `run` and records it. lasting: what it may read, which is neither freed nor moved while the tape lives.

        Raises NotRecordable; then `run` may have been left in its middle."""
        recorder, live_before = _Recorder(memory, lasting), memory.num_live
        recording.recorder = recorder
        try:
            with recorder:
                result = run()
        finally:
            recording.recorder = None
        if not memory.holds(result):
            raise NotRecordable("its result is none of the tensors that it made")
        self.result = memory.alias(result)
        del result
        if memory.num_live > live_before:
            raise NotRecordable(f"{memory.num_live - live_before} of its tensors outlive it")
        self._parts = list(recorder.parts())
        self.num_kernels = recorder.num_kernels

    def replay(self) -> torch.Tensor:
        for part in self._parts:
            part()
        return self.result


class _KernelCalls:
    """Kernels of one element type, one after the other."""

    def __init__(self, calls: list[tuple[NativeKernel, tuple[Any, ...]]]) -> None:
        self._kept = calls  # arrays that calls point to
        self._replay = calls[0][0].replay
        self._calls = (CKernelCall * len(calls))()
        for call, (kernel, arguments) in zip(self._calls, calls, strict=True):
            call.kernel = kernel.number
            numbers = [argument for argument in arguments if not isinstance(argument, float)]
            call.arguments[: len(numbers)] = [_as_number(number) for number in numbers]
            call.number = next((argument for argument in arguments if isinstance(argument, float)), 0.0)

    def __call__(self) -> None:
        self._replay(ctypes.addressof(self._calls), len(self._calls))


def _as_number(argument: Any) -> int:
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    return 0 if argument is None else int(argument)


class _TorchCall:
    """A function of tensors. Its results are copied to where the recorded ones lay; results empty: it is in place."""

    def __init__(self, function: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        self._function, self._args, self._kwargs, self._results = function, args, kwargs, results

    def __call__(self) -> None:
        fresh = self._function(*self._args, **self._kwargs)
        for result, now in zip(self._results, tree_leaves(fresh) if self._results else (), strict=True):
            result.copy_(now)


class _Recorder(TorchDispatchMode):
    def __init__(self, memory: TapeMemory, lasting: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._lasting = {tensor.untyped_storage().data_ptr() for tensor in lasting}
        self._steps: list[_TorchCall | tuple[NativeKernel, tuple[Any, ...]]] = []

    @property
    def num_kernels(self) -> int:
        return sum(isinstance(step, tuple) for step in self._steps)

    def parts(self) -> Iterator[Callable[[], None]]:
        """Kernels that follow each other are one part."""
        run: list[tuple[NativeKernel, tuple[Any, ...]]] = []
        for step in [*self._steps, None]:
            if run and not (isinstance(step, tuple) and step[0].replay is run[0][0].replay):
                yield _KernelCalls(run)
                run = []
            if isinstance(step, tuple):
                run.append(step)
            elif step is not None:
                yield step

    def called(self, kernel: NativeKernel, arguments: tuple[Any, ...]) -> None:
        if kernel.number is None:
            raise NotRecordable("it calls a kernel that cannot be replayed")
        self._steps.append((kernel, arguments))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            return self._memory.like(results)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = tree_leaves(results)
        if not all(isinstance(leaf, torch.Tensor) for leaf in made):
            raise NotRecordable(f"{func} gives more than tensors")
        places = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_in_place = func._schema.is_mutable
        if all(tensor.untyped_storage().data_ptr() in places for tensor in made) and not is_in_place:
            return results  # views: no work
        self._check(func, inputs)
        if is_in_place:
            if not self._memory.holds(args[0]) or len(made) != 1 or made[0] is not args[0]:
                raise NotRecordable(f"{func} changes what the function did not make")
            placed = results
        else:
            placed = tree_map(self._placed, results)
        args, kwargs = tree_map(self._alias, (args, kwargs))
        targets = [] if is_in_place else [self._alias(leaf) for leaf in tree_leaves(placed)]
        self._steps.append(_TorchCall(func, args, kwargs, targets))
        return placed

    def _check(self, func: Any, inputs: list[torch.Tensor]) -> None:
        varies = bool(_VARYING & set(func.tags)) and not _has_fixed_size(func, inputs)
        if not inputs or varies:
            raise NotRecordable(f"{func} reads no tensor, or its size depends on their values")
        for tensor in inputs:
            if not self._memory.holds(tensor) and tensor.untyped_storage().data_ptr() not in self._lasting:
                raise NotRecordable(f"{func} reads a tensor of {list(tensor.shape)} that is not known to last")

    def _placed(self, result: torch.Tensor) -> torch.Tensor:
        placed = self._memory.like(result)
        placed.copy_(result)
        return placed

    def _alias(self, value: Any) -> Any:
        return self._memory.alias(value) if isinstance(value, torch.Tensor) else value


def _has_fixed_size(func: Any, inputs: list[torch.Tensor]) -> bool:
    """Rows picked by their numbers; a mask's would vary."""
    return func is _aten.index.Tensor and not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs)

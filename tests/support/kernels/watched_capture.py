"""A stand-in for the capture that keeps what CUDA graphs keep: nothing of the recorded function but its result. It
notes every storage that the recorded launches read and did not make themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction


class ReadStorages(TorchDispatchMode):
    """Inside: which storages operations and Triton launches get, and which of them no operation inside made.

    read: by storage, the first operation that got it and its place among the arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[StorageWeakRef, str] = {}
        self._made: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func.name(), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self.read:
                self._made.add(storage)
        return result

    def note(self, operation: str, arguments: Any) -> None:
        for place, tensor in enumerate(_tensors(arguments)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._made:
                self.read.setdefault(storage, f"tensor {place} of {operation}")

    @property
    def freed(self) -> list[str]:
        """What was read and is gone since."""
        return [where for storage, where in self.read.items() if storage.expired()]


class WatchedCapture:
    """Warms up and records as `CudaCapture` does; a replay runs nothing."""

    def __init__(self) -> None:
        self.recordings: list[ReadStorages] = []

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        run()
        watch = ReadStorages()
        self.recordings.append(watch)
        with watch, noted_launches(watch):
            output = run()
        return lambda: output


@contextmanager
def noted_launches(watch: ReadStorages) -> Iterator[None]:
    """Triton's launches are no operations of torch: note their arguments too."""
    launch = JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        watch.note(self.fn.__name__, (args, options))
        return launch(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", noted)
        yield


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

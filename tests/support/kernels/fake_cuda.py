"""CUDA without a GPU or a driver: tensors that say they are on cuda:0 and hold nothing. Tensors on the host stay real.

The product's own start, recordings and decode steps run through it, line by line, on any build of torch. It notes
every operation on the device, every Triton launch, every copy and every answer that makes the host wait; inside a
capture, also what is not allowed there, and every storage that is read and was not made there. Answers are made up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from support.kernels.watched_capture import ReadStorages, noted_launches

CUDA = torch.device("cuda", 0)
GIB = 1 << 30
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "slice",
        "select",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "chunk",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "_reshape_alias",
        "narrow",
        "diagonal",
        "unfold",
        "lift_fresh",
    ]
)
EMPTY = frozenset(["empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided", "empty_permuted"])
ANSWERS = frozenset(
    ["_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique", "_unique2"]
)
H200 = SimpleNamespace(
    name="NVIDIA H200 (fake)",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * GIB,
    warp_size=32,
    shared_memory_per_block_optin=232448,
)


class FakeCuda(TorchDispatchMode):
    """Inside: operations on fake tensors are noted. launches: names since the last `clear()`, Triton's among them.

    waits: answers and copies that make the host wait. forbidden: what a capture does not allow. captures: what each
    capture read from outside. num_replays: of all graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.launches: list[str] = []
        self.waits: list[str] = []
        self.forbidden: list[str] = []
        self.captures: list[ReadStorages] = []
        self.captured: list[list[str]] = []  # each capture's launches
        self.num_replays = 0
        self._watch: ReadStorages | None = None

    def clear(self) -> None:
        for noted in (self.launches, self.waits):
            noted.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("pin_memory", "_pin_memory", "is_pinned"):
            return True if name == "is_pinned" else args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        goes_to = _target(name, leaves, kwargs)
        if not on_device and goes_to != "cuda":
            return func(*args, **kwargs)
        copied = self._copied(name, args, kwargs, goes_to)
        if copied is not None:
            return copied
        if name in ANSWERS:
            return self._answer(name, args)
        hosts = [leaf for leaf in leaves if _is_on_host(leaf) and leaf.dim() > 0]
        if hosts:
            self._wait(f"{name} reads a tensor of the host, {tuple(hosts[0].shape)}")
        return self._run(func, name, args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = CUDA
        with self._fake:
            if self._watch is None:
                result = func(*args, **kwargs)
            else:
                result = self._watch.__torch_dispatch__(func, (), args, kwargs)
        if not (name in VIEWS or name in EMPTY or name.startswith("prim::") or _is_unchanged(name, args, result)):
            self.launches.append(name)
        return result

    def copy_(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """In the place of `Tensor.copy_` into a fake tensor, whose own code asks for CUDA's guard."""
        if self._copied("copy_", (target, source), {"non_blocking": non_blocking}, None) is None:
            self.launches.append("copy_")
        if self._watch is not None:
            self._watch.note("copy_", (target, source))
        return target

    def _copied(self, name: str, args: Any, kwargs: dict[str, Any], goes_to: str | None) -> Any:
        """The result of a copy between host and device; None for any other operation."""
        if name == "copy_":
            target, source = args[0], args[1]
            if _is_on_host(source) and source.dim() > 0 and isinstance(target, FakeTensor):
                self._copy("host to device", waits=not ((len(args) > 2 and args[2]) or kwargs.get("non_blocking")))
                return target
            if _is_on_host(target):
                self._copy("device to host", waits=True)
                return target.zero_()
        if name not in {"_to_copy", "to"}:
            return None
        source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        waits = not kwargs.get("non_blocking", False)
        if isinstance(source, FakeTensor):
            if goes_to != "cpu":
                return None
            self._copy("device to host", waits=waits)
            return torch.zeros(tuple(source.shape), dtype=dtype)
        self._copy("host to device", waits=waits and source.dim() > 0)
        with self._fake:
            return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=CUDA)

    def _copy(self, direction: str, *, waits: bool) -> None:
        self.launches.append(direction)
        if waits:
            self._wait(direction)
        elif self._watch is not None:
            self.forbidden.append(direction)

    def _answer(self, name: str, args: Any) -> Any:
        self._wait(name)
        if name in ("_local_scalar_dense", "item"):
            return 0.0 if args[0].dtype.is_floating_point else 0
        return name not in ("equal",)

    def _wait(self, what: str) -> None:
        self.waits.append(what)
        if self._watch is not None:
            self.forbidden.append(what)

    @contextlib.contextmanager
    def capture(self, *_: Any, **__: Any) -> Iterator[None]:
        """In the place of `torch.cuda.graph`."""
        first = len(self.launches)
        self._watch = ReadStorages()
        self.captures.append(self._watch)
        try:
            with noted_launches(self._watch):
                yield
        finally:
            self._watch = None
            self.captured.append(self.launches[first:])

    def note_launch(self, *, fn: Any, **_: Any) -> bool:
        """Triton's hook before it compiles: True stops the launch."""
        self.launches.append(fn.jit_function.fn.__name__)
        return True


def _target(name: str, leaves: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Where the operation's result is asked to be."""
    device = kwargs.get("device")
    if device is None and name == "to":
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    return None if device is None else torch.device(device).type


def _is_unchanged(name: str, args: Any, result: Any) -> bool:
    """A conversion to what the tensor is already launches nothing."""
    return name == "to" and result.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)


class _Stream:
    """One of the two that exist; work on it is done at once."""

    device = CUDA
    cuda_stream = 7

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Triton:
    """As much of a Triton driver as a launch asks before it compiles."""

    def get_current_device(self) -> int:
        return 90

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, torch sees one H200 on this thread."""
    mode = FakeCuda()

    def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return mode.copy_(target, source, non_blocking)

    class Graph:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def replay(self) -> None:
            mode.num_replays += 1

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: H200.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: H200,
        "mem_get_info": lambda device=None: (130 * GIB, 141 * GIB),
        "memory_allocated": lambda device=None: 16 * GIB,
        "max_memory_allocated": lambda device=None: 18 * GIB,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": mode.capture,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "set_device": lambda device: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
        "_lazy_init": lambda: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        patch.setattr(FakeTensor, "data_ptr", _address, raising=False)
        patch.setattr(FakeTensor, "__getitem__", _item, raising=False)
        patch.setattr(FakeTensor, "__setitem__", _item, raising=False)
        patch.setattr(FakeTensor, "copy_", copied, raising=False)
        patch.setattr(torch, "tensor", _tensor(torch.tensor))
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", mode.note_launch)
        torch._C._ensureCUDADeviceGuardSet()
        driver.set_active(_Triton())  # type: ignore[arg-type]
        try:
            with torch.inference_mode(), mode:  # autograd's own kernels ask for CUDA's guard before any mode is asked
                yield mode
        finally:
            driver._active = None


def _address(tensor: FakeTensor) -> int:
    """Aligned as CUDA's allocator aligns, and never the host's."""
    return (1 << 40) + (tensor.untyped_storage()._cdata << 9) + tensor.storage_offset() * tensor.element_size()


def _item(tensor: torch.Tensor, index: Any, value: Any = None) -> Any:
    """Indexing, and with a value assignment, in torch's operations: its own code asks for CUDA's guard, which a build
    for CPUs lacks."""
    parts = index if isinstance(index, tuple) else (index,)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    view, axis, indices = tensor, 0, list[Any]()
    for part in parts:
        if part is Ellipsis:
            axis += tensor.dim() - used
        elif part is None:
            view, axis = view.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            assert part.step in (None, 1), "no step is needed here"
            view, axis = torch.ops.aten.slice.Tensor(view, axis, part.start, part.stop), axis + 1
        elif isinstance(part, torch.Tensor):
            indices += [None] * (axis - len(indices)) + [part]
            axis += 1
        else:
            view = view.select(axis, int(part))
    if value is None:
        return torch.ops.aten.index.Tensor(view, indices) if indices else view
    source = value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=tensor.dtype, device=CUDA)
    if indices:
        return torch.ops.aten.index_put_.default(view, indices, source)
    return view.copy_(source)


def _tensor(original: Any) -> Any:
    """`torch.tensor` fills the device's memory itself, past every mode: make the tensor on the host and copy it."""

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made: torch.Tensor = original(data, **{**options, "pin_memory": False})
        is_fake = device is not None and torch.device(device).type == "cuda"
        return made.to(CUDA) if is_fake else made

    return tensor


def on_fake_cuda(model: torch.nn.Module) -> None:
    """Move every tensor that the modules, and the engine's plain objects in them, hold. Inside `fake_cuda()`."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the host's, which keeps the id, and the fake one
    done: set[int] = set()
    for module in model.modules():
        _move(module, moved, done)


def _move(holder: Any, moved: dict[int, tuple[torch.Tensor, torch.Tensor]], done: set[int]) -> None:
    if id(holder) in done:
        return
    done.add(id(holder))
    own = vars(holder)
    for table in (own, own.get("_parameters", {}), own.get("_buffers", {})):
        for name, value in list(table.items()):
            if _is_on_host(value):
                if id(value) not in moved:
                    moved[id(value)] = value, value.detach().to(CUDA)
                table[name] = moved[id(value)][1]
            elif type(value).__module__.startswith("server.engine") and hasattr(value, "__dict__"):
                _move(value, moved, done)

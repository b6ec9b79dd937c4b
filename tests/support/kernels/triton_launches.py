"""Runs the real launchers without a GPU and records what they would launch: which kernel, compiled how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from lora_kernels.attention import triton_launch as paged
from lora_kernels.lora import triton_launch as lora
from lora_kernels.nf4 import triton_nf4 as nf4
from lora_kernels.triton_common.available import triton_switch
from lora_kernels.triton_common.tiles import TILES, ArchitectureTiles, DeviceTiles
from support.kernels.triton_compile import Compiled, read_compiled

MULTIPROCESSORS = {80: 108, 89: 58, 90: 132}  # A100, L4, H100


@dataclass(frozen=True)
class Launch:
    """One launch. key: all that Triton compiles anew for."""

    kernel: Any
    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constant(self, name: str) -> Any:
        """The value of a compile-time argument."""
        return self.constants[self.kernel.arg_names.index(name),]

    def compile_for(self, capability: int, folder: Path | None = None) -> Compiled:
        """Exactly what this launch would run."""
        source = ASTSource(self.kernel, self.signature, constexprs=self.constants, attrs=self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return read_compiled(compiled, folder)


class _NoGpu:
    """As much of a Triton driver as a launch asks before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it knows of a device by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def recorded_launches(capability: int = 90, tiles: ArchitectureTiles | None = None) -> Iterator[list[Launch]]:
    """Inside, launchers take CPU tensors and nothing runs: what they return is what `empty` left. tiles: instead of the
    table's."""
    launches: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        key = f"{fn.name} {compile['key']}"
        launches.append(
            Launch(fn.jit_function, key, compile["signature"], compile["constants"], compile["configs"][0], options)
        )
        return True  # Triton assumes that another thread compiles, and does not launch

    tiles = tiles or TILES[capability]
    chosen = DeviceTiles(tiles, MULTIPROCESSORS[capability] * tiles.programs_per_multiprocessor)
    with pytest.MonkeyPatch.context() as patch:
        for module in (lora, nf4, paged):
            patch.setattr(module, "device_tiles", lambda device: chosen)
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        patch.setattr(triton_switch(), "on_cpu", True)
        driver.set_active(_NoGpu(capability))  # type: ignore[arg-type]
        try:
            yield launches
        finally:
            driver._active = None

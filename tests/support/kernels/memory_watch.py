"""Watches Triton's interpreter: runs a launch's programs in random order and checks every address that they touch.

An address must lie inside the memory of one of the launch's arguments. Two programs must not write one address, and
none may read what another writes: on a device their order is not fixed. Within one program, a store must not write an
address twice and nothing may be read after it was stored, because threads do not wait for each other in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

Addresses = NDArray[np.uint64]


class Access(NamedTuple):
    program: int
    storage: int  # its place among the launch's, by address
    addresses: Addresses


@dataclass(eq=False)
class _Launch:
    """One launch. firsts, ends: the bounds of its arguments' memory, rising. order: of its programs."""

    kernel: str
    firsts: Addresses
    ends: Addresses
    grid: tuple[int, int, int] = (0, 0, 0)
    order: list[int] = field(default_factory=list)
    program: int = -1
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)

    def storage_of(self, address: np.uint64) -> int:
        return int(np.searchsorted(self.firsts, address, side="right")) - 1

    def is_inside(self, addresses: Addresses, size: int) -> bool:
        """Whether all of them lie in the argument in which the lowest lies."""
        storage = self.storage_of(addresses.min())
        return storage >= 0 and bool(addresses.max() + np.uint64(size) <= self.ends[storage])


@dataclass(eq=False)
class MemoryWatch:
    """findings: kernel and fault, each once. num_launches, num_programs: watched so far."""

    findings: list[str] = field(default_factory=list)
    num_launches: int = 0
    num_programs: int = 0
    _launch: _Launch | None = None
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def take(self) -> list[str]:
        """The findings so far; the list is empty afterwards."""
        found, self.findings = self.findings, []
        return found

    @contextmanager
    def launch(self, kernel: str, arguments: list[Any]) -> Iterator[None]:
        storages = {
            argument.untyped_storage().data_ptr(): argument.untyped_storage().nbytes()
            for argument in arguments
            if isinstance(argument, torch.Tensor) and argument.untyped_storage().nbytes()
        }
        firsts = np.array(sorted(storages), dtype=np.uint64)
        sizes = np.array([storages[int(first)] for first in firsts], dtype=np.uint64)
        self._launch = _Launch(kernel, firsts, firsts + sizes)
        self.num_launches += 1
        try:
            yield
            self._check_programs(self._launch)
        finally:
            self._launch = None

    def order(self, grid: tuple[int, int, int]) -> None:
        if self._launch is not None:
            count = grid[0] * grid[1] * grid[2]
            self._launch.grid, self._launch.order = grid, self._random.sample(range(count), count)

    def next_program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """Whose turn it is in place of (x, y, z)."""
        launch = self._launch
        if launch is None:
            return x, y, z
        _, ny, nz = launch.grid
        launch.program = launch.order[(x * ny + y) * nz + z]
        self.num_programs += 1
        return launch.program // (ny * nz), launch.program // nz % ny, launch.program % nz

    def on_load(self, pointers: Any, mask: Any) -> None:
        if (access := self._access("reads", pointers, mask)) is None or self._launch is None:
            return
        own = (write for write in self._launch.writes if write[:2] == access[:2])
        if any(np.isin(access.addresses, write.addresses).any() for write in own):
            self._note("a program reads what it has stored")
        self._launch.reads.append(access)

    def on_store(self, pointers: Any, mask: Any) -> None:
        if (access := self._access("writes", pointers, mask)) is None or self._launch is None:
            return
        if len(np.unique(access.addresses)) < len(access.addresses):
            self._note("one store writes an address twice")
        self._launch.writes.append(access)

    def _access(self, verb: str, pointers: Any, mask: Any) -> Access | None:
        """What one load or store touches; None: nothing. Raises IndexError before foreign memory is touched."""
        if self._launch is None:
            return None
        chosen = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[chosen].astype(np.uint64)
        if not addresses.size:
            return None
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not self._launch.is_inside(addresses, size):
            self._note(f"a program {verb} outside its arguments")
            raise IndexError(self.findings[-1])
        return Access(self._launch.program, self._launch.storage_of(addresses.min()), addresses)

    def _check_programs(self, launch: _Launch) -> None:
        for storage in {write.storage for write in launch.writes}:
            writes = [write for write in launch.writes if write.storage == storage]
            addresses = np.concatenate([write.addresses for write in writes])
            programs = np.concatenate([np.full(write.addresses.size, write.program) for write in writes])
            rising = np.argsort(addresses, kind="stable")
            addresses, programs = addresses[rising], programs[rising]
            if ((addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])).any():
                self._note("two programs write one address")
            for read in (read for read in launch.reads if read.storage == storage):
                found = np.minimum(np.searchsorted(addresses, read.addresses), addresses.size - 1)
                if ((addresses[found] == read.addresses) & (programs[found] != read.program)).any():
                    self._note("a program reads what another writes")

    def _note(self, fault: str) -> None:
        assert self._launch is not None
        if (line := f"{self._launch.kernel}: {fault}") not in self.findings:
            self.findings.append(line)


@contextmanager
def watched_memory() -> Iterator[MemoryWatch]:
    """Inside, every interpreted launch is watched."""
    watch, builder = MemoryWatch(), type(interpreter.interpreter_builder)
    run, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def watched_run(self: Any, *arguments: Any, **options: Any) -> Any:
        with watch.launch(self.fn.__name__, [*arguments, *options.values()]):
            return run(self, *arguments, **options)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.on_load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.on_store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def ordered_dim(self: Any, x: int, y: int, z: int) -> None:
        watch.order((x, y, z))
        set_dim(self, x, y, z)

    def ordered_index(self: Any, x: int, y: int, z: int) -> None:
        set_index(self, *watch.next_program(x, y, z))

    replaced: dict[str, Callable[..., Any]] = {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "set_grid_dim": ordered_dim,
        "set_grid_idx": ordered_index,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        for name, function in replaced.items():
            patch.setattr(builder, name, function)
        yield watch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` returns NaN, so that a value which no program wrote becomes visible."""
    was_on, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    switch = torch._C._set_deterministic_algorithms  # `torch.use_...` imports the compiler, which takes seconds
    switch(True, warn_only=True)
    try:
        yield
    finally:
        switch(was_on, warn_only=was_warning)

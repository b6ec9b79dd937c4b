"""Memory of adapters that are gone is given to those that come, and never while anybody still reads it."""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.packed.host_buffers import LEAST_BYTES, HostBuffers
from adapters_store.packed.layout import ALIGN_BYTES
from adapters_store.packed.packed_file import as_bytes
from lora_kernels import background
from lora_kernels.background import TimeSlices

MIB = 1 << 20
SEVEN = 7 * MIB


def take(buffers: HostBuffers, num_bytes: int, value: int = 0) -> torch.Tensor:
    """Bytes, all of this value."""
    return buffers.take(num_bytes, torch.uint8).fill_(value)


def test_the_next_adapter_gets_the_memory_of_the_one_that_is_gone() -> None:
    buffers = HostBuffers(2 * SEVEN)
    first = take(buffers, SEVEN)
    address = first.data_ptr()
    del first
    assert buffers.num_spare_bytes == SEVEN
    assert take(buffers, SEVEN - 5).data_ptr() == address
    assert buffers.num_spare_bytes == SEVEN


@pytest.mark.parametrize(
    "view",
    [
        lambda buffer: buffer[1:],
        lambda buffer: buffer.view(torch.int32)[8:16],
        lambda buffer: buffer.numpy()[3:],
        lambda buffer: as_bytes(buffer)[1:].data,
    ],
)
def test_memory_that_anybody_still_reads_is_not_given_away(
    view: Callable[[torch.Tensor], torch.Tensor | np.ndarray | memoryview],
) -> None:
    buffers = HostBuffers(4 * SEVEN)
    held = view(take(buffers, SEVEN, value=1))
    gc.collect()
    others = [take(buffers, SEVEN, value=2) for _ in range(3)]
    assert buffers.num_spare_bytes == 0
    assert set(np.asarray(held).tobytes()) == {1}
    del held, others
    assert buffers.num_spare_bytes == 4 * SEVEN


def test_what_is_in_use_and_what_is_kept_stay_within_the_budget() -> None:
    buffers = HostBuffers(10 * MIB)
    for num_bytes in (4 * MIB, 3 * MIB, 2 * MIB, 1 * MIB):
        del_me = [take(buffers, num_bytes)]
        del_me.clear()
    assert buffers.num_spare_bytes == 10 * MIB
    held = take(buffers, 5 * MIB)
    assert buffers.num_spare_bytes == 3 * MIB  # the longest unused have gone
    other = take(buffers, 8 * MIB)  # more than there should be: nothing is kept beside it
    assert buffers.num_spare_bytes == 0
    del held, other


def test_a_buffer_of_another_size_class_is_not_taken() -> None:
    buffers = HostBuffers(100 * MIB)
    take(buffers, 8 * MIB)
    small = take(buffers, 4 * MIB)
    assert buffers.num_spare_bytes == 8 * MIB
    del small


def test_without_a_budget_and_for_small_adapters_nothing_is_kept() -> None:
    none, some = HostBuffers(), HostBuffers(100 * MIB)
    for buffers, num_bytes in ((none, SEVEN), (none, SEVEN), (some, LEAST_BYTES - 1)):
        take(buffers, num_bytes)
    assert (none.num_spare_bytes, some.num_spare_bytes) == (0, 0)


@pytest.mark.parametrize("num_elements", [1, 63, LEAST_BYTES // 4, 1_000_003])
def test_a_buffer_is_as_long_as_asked_for_and_starts_on_a_cache_line(num_elements: int) -> None:
    buffers = HostBuffers(100 * MIB)
    for dtype in (torch.float32, torch.bfloat16):
        buffer = buffers.take(num_elements, dtype)
        assert (buffer.shape, buffer.dtype) == ((num_elements,), dtype)
        assert buffer.data_ptr() % ALIGN_BYTES == 0


def test_threads_that_take_and_drop_never_share_memory() -> None:
    buffers = HostBuffers(20 * MIB)
    wrong: list[int] = []

    def use(value: int) -> None:
        for size in range(60):
            buffer = take(buffers, MIB + size * 4096, value)
            if not bool((buffer == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=use, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not background.is_available(), reason="no C compiler")
def test_loads_that_follow_each_other_fault_no_pages_in(tmp_path: Path) -> None:
    path, buffers = tmp_path / "adapter", HostBuffers(4 * SEVEN)
    path.write_bytes(os.urandom(SEVEN))

    def faults(held: list[torch.Tensor]) -> int:
        """Of one load, while the last two adapters are still held."""
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        held.append(buffers.take(SEVEN, torch.uint8))
        background.read_file(path, as_bytes(held[-1]), TimeSlices())
        del held[:-2]
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    held: list[torch.Tensor] = []
    counts = [faults(held) for _ in range(9)]
    assert max(counts[3:]) < 64, f"page faults of each load: {counts}"  # the first three make SEVEN / 4096 each

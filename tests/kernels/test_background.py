"""Background reads and copies: exact bytes, the published checksum, and errors that say which file."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from lora_kernels import background

pytestmark = pytest.mark.skipif(not background.is_available(), reason="no C compiler")

SIZES = [0, 1, 3, 4, 7, 31, 32, 33, 63, 500, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 33, 1_000_003]


def _bytes(size: int) -> background.Bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_the_checksum_is_xxh64(size: int) -> None:
    data = _bytes(size)
    assert background.checksum(data) == xxhash.xxh64(data.tobytes()).intdigest()


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_read_whole_and_summed(tmp_path: Path, size: int) -> None:
    data, into = _bytes(size), np.full(size, 0xAA, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    assert background.read_file(tmp_path / "file", into) == background.checksum(data)
    assert (into == data).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_touches_its_place_and_nothing_else(size: int) -> None:
    data, room = _bytes(size), np.full(size + 64, 0xAA, dtype=np.uint8)
    background.copy_bytes(room[32 : 32 + size], data)
    assert (room[32 : 32 + size] == data).all()
    assert (room[:32] == 0xAA).all()
    assert (room[32 + size :] == 0xAA).all()


@pytest.mark.parametrize("length", [99, 101])
def test_a_file_of_another_length_is_an_error_that_names_it(tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(bytes(length))
    with pytest.raises(OSError, match="file"):
        background.read_file(tmp_path / "file", np.empty(100, dtype=np.uint8))


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        background.read_file(tmp_path / "none", np.empty(1, dtype=np.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling classes are Linux's")
def test_the_caller_keeps_its_own_scheduling_class() -> None:
    before = os.sched_getscheduler(0)
    background.checksum(_bytes(1000))
    assert os.sched_getscheduler(0) == before


def test_python_goes_on_while_bytes_are_moved(tmp_path: Path) -> None:
    """A read that held the GIL would leave the counting thread at a standstill."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it blocks until somebody writes
    reader = threading.Thread(target=lambda: _read_or_fail(pipe))
    reader.start()
    counted = sum(1 for _ in range(1000))
    time.sleep(0.01)
    assert counted == 1000
    assert reader.is_alive()
    os.close(os.open(pipe, os.O_WRONLY))
    reader.join(5)
    assert not reader.is_alive()


def _read_or_fail(path: Path) -> None:
    with pytest.raises(OSError):
        background.read_file(path, np.empty(10, dtype=np.uint8))

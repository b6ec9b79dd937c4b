"""Background reads and copies: exact bytes, the published checksum, and errors that say which file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from lora_kernels import background
from lora_kernels.background import TimeSlices

pytestmark = pytest.mark.skipif(not background.is_available(), reason="no C compiler")

SIZES = [0, 1, 3, 4, 7, 31, 32, 33, 63, 500, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 33, 1_000_003]


def _bytes(size: int) -> background.Bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_the_checksum_is_xxh64(size: int) -> None:
    data = _bytes(size)
    assert background.checksum(data, TimeSlices()) == xxhash.xxh64(data.tobytes()).intdigest()


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_read_whole_and_summed(tmp_path: Path, size: int) -> None:
    data, into = _bytes(size), np.full(size, 0xAA, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    assert background.read_file(tmp_path / "file", into, TimeSlices()) == background.checksum(data, TimeSlices())
    assert (into == data).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_touches_its_place_and_nothing_else(size: int) -> None:
    data, room = _bytes(size), np.full(size + 64, 0xAA, dtype=np.uint8)
    background.copy_bytes(room[32 : 32 + size], data, TimeSlices())
    assert (room[32 : 32 + size] == data).all()
    assert (room[:32] == 0xAA).all()
    assert (room[32 + size :] == 0xAA).all()


@pytest.mark.parametrize("distance", [1, 64, 100_000])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_down_over_its_own_source_is_whole(size: int, distance: int) -> None:
    room, data = _bytes(size + distance), _bytes(size + distance)[distance:].copy()
    background.copy_bytes(room[:size], room[distance:], TimeSlices())
    assert (room[:size] == data).all()


@pytest.mark.parametrize("length", [99, 101])
def test_a_file_of_another_length_is_an_error_that_names_it(tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(bytes(length))
    with pytest.raises(OSError, match="file"):
        background.read_file(tmp_path / "file", np.empty(100, dtype=np.uint8), TimeSlices())


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        background.read_file(tmp_path / "none", np.empty(1, dtype=np.uint8), TimeSlices())


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_in_pieces_is_the_whole(size: int) -> None:
    data = _bytes(size)
    assert b"".join(background.pieces(data, TimeSlices())) == data.tobytes()

"""Memory is divided by what this process may take: the container's limit counts where it is the smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.host_memory import free_host_bytes


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n")
    return file


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 4_096_000), ("3000000", "1000000", 2_000_000), ("9000000000", "0", 4_096_000)],
)
def test_the_smaller_of_machine_and_container_is_free(
    tmp_path: Path, meminfo: Path, limit: str, used: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert free_host_bytes(tmp_path, meminfo) == expected


def test_without_a_container_the_kernels_estimate_counts(tmp_path: Path, meminfo: Path) -> None:
    assert free_host_bytes(tmp_path / "none", meminfo) == 4_096_000

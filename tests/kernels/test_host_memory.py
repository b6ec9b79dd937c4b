"""Memory is divided by what this process may take: the container's limit counts where it is the smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kernels.cgroups import free_host_bytes


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


@pytest.mark.parametrize(
    ("own", "group", "names"),
    [
        ("0::/a.slice/m.service", "a.slice/m.service", ("memory.max", "memory.current")),  # systemd's MemoryMax
        ("0::/a.slice/m.service", "a.slice", ("memory.max", "memory.current")),
        ("8:memory:/docker/0123", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("8:memory:/pods/p", "memory/pods/p", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_the_limit_of_every_group_above_counts_in_either_version(
    tmp_path: Path, meminfo: Path, own: str, group: str, names: tuple[str, str]
) -> None:
    folder = tmp_path / "cgroup" / group
    folder.mkdir(parents=True)
    (folder / names[0]).write_text("3000000\n")
    (folder / names[1]).write_text("1000000\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert free_host_bytes(tmp_path / "cgroup", meminfo, tmp_path / "own") == 2_000_000


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_cached_files_of_a_container_count_as_free(
    tmp_path: Path, meminfo: Path, limit: str, used: str, cached: str
) -> None:
    """A base's weights that were read fill the page cache up to the limit; the kernel drops them when it needs room."""
    (tmp_path / limit).write_text("3000000\n")
    (tmp_path / used).write_text("2999000\n")
    (tmp_path / "memory.stat").write_text(f"anon 900000\nfile 2000000\n{cached} 1500000\nactive_file 500000\n")
    assert free_host_bytes(tmp_path, meminfo) == 1_501_000

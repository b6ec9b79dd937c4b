"""A container's or a unit's limit on CPUs is where the kernel writes it, in either version of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.cgroups import affinity, cpu_quota, limit_folders, physical_cores, usable_cpus


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


# files under /sys/fs/cgroup, /proc/self/cgroup, CPUs
GROUPS: list[tuple[dict[str, str], str, float | None]] = [
    ({"cpu.max": "max 100000"}, "0::/\n", None),
    ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),  # docker run --cpus 1.5
    ({"cpu.max": "50000 100000"}, "0::/\n", 0.5),
    ({"a.slice/m.service/cpu.max": "400000 100000"}, "0::/a.slice/m.service\n", 4.0),  # systemd's CPUQuota=400%
    ({"a.slice/cpu.max": "200000 100000", "a.slice/m.service/cpu.max": "max 100000"}, "0::/a.slice/m.service\n", 2.0),
    ({"a.slice/cpu.max": "200000 100000"}, "0::/b.slice\n", None),
    ({"cpu.max": "300000 100000"}, "0::/../../outside\n", 3.0),
    ({"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
     "4:cpu,cpuacct:/docker/0123\n3:memory:/docker/0123\n", 2.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", None),
    ({"cpu/pods/p/cpu.cfs_quota_us": "100000", "cpu/pods/p/cpu.cfs_period_us": "50000"}, "4:cpu:/pods/p\n", 2.0),
    ({"unified/cpu.max": "100000 100000"}, "0::/\n4:memory:/\n", 1.0),
    ({"cpu.max": "100000"}, "0::/\n", None),
    ({}, "", None),
]  # fmt: skip


@pytest.mark.parametrize(("files", "own", "expected"), GROUPS)
def test_the_quota_is_the_least_of_all_groups_above(
    tmp_path: Path, files: dict[str, str], own: str, expected: float | None
) -> None:
    root = written(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own)
    assert cpu_quota(root, tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "cpus"), [("50000", 1), ("199999", 1), ("200000", 2), ("99999900000", None)])
def test_threads_are_whole_cpus_within_the_affinity(tmp_path: Path, quota: str, cpus: int | None) -> None:
    root = written(tmp_path, {"cpu.max": f"{quota} 100000"})
    expected = affinity() if cpus is None else min(cpus, affinity())
    assert usable_cpus(root, tmp_path / "none") == expected


def test_two_threads_of_one_core_are_one_core(tmp_path: Path) -> None:
    lists = {f"cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)}
    assert physical_cores(written(tmp_path, lists)) == 2
    assert physical_cores(tmp_path / "none") == affinity()


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert limit_folders("cpu", tmp_path / "none", tmp_path / "none") == []
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == affinity()


CODE = """
import os
from lora_kernels import cgroups, process
cgroups.affinity = process.affinity = process.physical_cores = lambda: 64
cgroups.cpu_quota = lambda *_: {quota}
process.hold_to_quota()
import torch
from pathlib import Path
from server.engine.startup.settings import EngineSettings
from server.jobs.worker.supervisor import default_threads
engine = EngineSettings(base=Path()).compute_threads
print(os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads() == engine, default_threads(2))
"""


@pytest.mark.parametrize(
    ("quota", "own", "omp", "jobs"),
    [(8.5, {}, "8", "2"), (None, {}, "None", "16"), (8.5, {"OMP_NUM_THREADS": "3"}, "3", "None")],
)
def test_torch_engine_and_trainings_keep_to_the_quota(
    quota: float | None, own: dict[str, str], omp: str, jobs: str
) -> None:
    """Of 64 cores the container may use 8: torch would start 64 threads, and all wait while one is throttled."""
    bare = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    code = CODE.format(quota=quota)
    done = subprocess.run([sys.executable, "-c", code], env={**bare, **own}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [omp, "True", jobs]


HELD = """
import ctypes, sys
from lora_kernels.process import map_large_blocks
if "map" in sys.argv:
    map_large_blocks()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.free.argtypes = [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
SIZE = 16 << 20

def block(size):
    address = c.malloc(size)
    c.memset(address, 1, size)
    return address

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

c.free(block(SIZE))  # glibc's threshold is now this size
before = resident()
blocks = [(block(SIZE), block(64 << 10)) for _ in range(8)]  # each large one lies below a small one
for large, _ in blocks:
    c.free(large)
print((resident() - before) // SIZE)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_that_a_training_frees_go_back_to_the_system() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    held = [
        int(subprocess.check_output([sys.executable, "-c", HELD, *how], env=environment, text=True))
        for how in ([], ["map"])
    ]
    assert held[0] >= 6, "glibc alone keeps them"
    assert held[1] <= 0

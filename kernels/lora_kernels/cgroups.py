"""The CPUs and the memory that this process may use: the machine's, or what its control groups (container, service
unit) allow. Imports no torch.

Versions 1 and 2 are read. A limit holds for all groups below it, so every group above this process's own counts. own:
which groups that are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
_LIMIT_USED_CACHED = (  # of version 2 and of version 1; cached: the line of memory.stat
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def limit_folders(controller: str, root: Path = CGROUP, own: Path = OWN) -> list[Path]:
    """The folders whose limits on `controller` ("cpu", "memory") hold for this process, outermost first.

    Inside a container the mounted root is the group's own folder, whatever its name is outside.
    """
    found = [root]
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_second = controllers == ""
        if not is_second and controller not in controllers.split(","):
            continue
        mounts = (root, root / "unified") if is_second else (root / controllers, root / controller)
        found += [folder for mount in mounts for folder in _down_to(mount, path)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def cpu_quota(root: Path = CGROUP, own: Path = OWN) -> float | None:
    """CPUs that the control groups allow, 1.5 for 150 ms in each 100 ms; None without a limit."""
    quotas = [quota for folder in limit_folders("cpu", root, own) for quota in _quotas(folder)]
    return min(quotas, default=None)


def affinity() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores of the machine, two threads of one core counted once; the affinity if the system does not report them."""
    siblings = {file.read_text() for file in cpus.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings) or affinity()


def usable_cpus(root: Path = CGROUP, own: Path = OWN) -> int:
    """How many threads may compute all the time: the affinity, or the whole CPUs of the quota; at least 1."""
    quota = cpu_quota(root, own)
    return affinity() if quota is None else max(1, min(affinity(), int(quota)))


def free_host_bytes(cgroup: Path = CGROUP, meminfo: Path = MEMINFO, own: Path = OWN) -> int | None:
    """How much memory may still be taken: the machine's, or the container's if that is less; None: unknown."""
    free = _available(meminfo)
    if free is None:
        return None
    return min([free, *(left for folder in limit_folders("memory", cgroup, own) for left in _left_in(folder))])


def _number_in(file: Path) -> int | None:
    """The number that the file holds alone; None for "max", -1 or a missing file."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isascii() and text.isdigit() else None


def _down_to(mount: Path, path: str) -> Iterator[Path]:
    folder = mount
    yield folder
    for part in path.split("/"):
        if part == "..":  # the group is outside what is mounted here
            return
        folder = folder / part
        yield folder


def _quotas(folder: Path) -> Iterator[float]:
    second = folder / "cpu.max"
    if second.is_file():
        quota, _, period = second.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
    quota_us, period_us = _number_in(folder / "cpu.cfs_quota_us"), _number_in(folder / "cpu.cfs_period_us")
    if quota_us is not None and period_us:
        yield quota_us / period_us


def _left_in(group: Path) -> Iterator[int]:
    """Bytes left under the limit of a control group of either version, if it has one. Pages of files that nothing used
    lately count as free, as in the kernel's estimate of the machine's: a limit is met by dropping them."""
    for limit_file, used_file, cached in _LIMIT_USED_CACHED:
        limit, used = _number_in(group / limit_file), _number_in(group / used_file)
        if limit is not None and used is not None:
            yield max(0, limit - used + _stat(group / "memory.stat", cached))


def _stat(file: Path, name: str) -> int:
    """The number beside a name; 0 if it is not there."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _available(meminfo: Path) -> int | None:
    """The kernel's estimate, which counts the page cache as free; else the idle pages."""
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

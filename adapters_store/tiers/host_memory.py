"""How much host memory may still be taken: the machine's, or the container's if that is less. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_kernels.cgroups import CGROUP, OWN, limit_folders, number_in

MEMINFO = Path("/proc/meminfo")
_LIMIT_AND_USED = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_host_bytes(cgroup: Path = CGROUP, meminfo: Path = MEMINFO, own: Path = OWN) -> int | None:
    """None if the system does not say. own: which control groups this process is in."""
    free = _available(meminfo)
    if free is None:
        return None
    return min([free, *(left for folder in limit_folders("memory", cgroup, own) for left in _left_in(folder))])


def _left_in(group: Path) -> Iterator[int]:
    """Bytes left under the limit of a control group of either version, if it has one."""
    for limit_file, used_file in _LIMIT_AND_USED:
        limit, used = number_in(group / limit_file), number_in(group / used_file)
        if limit is not None and used is not None:
            yield max(0, limit - used)


def _available(meminfo: Path) -> int | None:
    """The kernel's estimate, which counts the page cache as free; else the idle pages."""
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

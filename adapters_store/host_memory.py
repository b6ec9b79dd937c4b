"""How much host memory may still be taken: the machine's, or the container's if that is less. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def free_host_bytes(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int | None:
    """None where the system does not say."""
    free = _available(meminfo)
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if free is None or not (limit.is_file() and used.is_file()) or not limit.read_text().strip().isdigit():
        return free
    return min(free, int(limit.read_text()) - int(used.read_text()))


def _available(meminfo: Path) -> int | None:
    """The kernel's own estimate, which counts the page cache as free; else what lies idle."""
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

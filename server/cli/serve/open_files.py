"""How many files and connections the process may have open. Decides the store's reserve; opens nothing."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from server.cli.common.failures import CommandError, ExitCode

RESERVED_FILES = 256  # for the database, blobs, uploads, jobs, logs and libraries; a start needs about 60
MIN_CONNECTIONS = 16
MOST_WANTED = 1 << 20  # no system needs more; some report a far larger limit


@dataclass(frozen=True)
class ConnectionLimits:
    """total: at once. each: of one address."""

    total: int
    each: int


def raise_soft_limit() -> int:
    """Raise this process's own limit of open files to what the system allows; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_WANTED if hard == resource.RLIM_INFINITY else min(hard, MOST_WANTED)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MOST_WANTED if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # macOS reports a hard limit that it does not grant
        return soft
    return most


def limits_within(asked: ConnectionLimits, open_files: int) -> ConnectionLimits:
    """The limits asked for, or smaller ones if the system allows fewer open files.

    One address keeps its share of them, and at least half. Raises CommandError (too_few_files).
    """
    room = open_files - RESERVED_FILES
    if room < MIN_CONNECTIONS:
        least = RESERVED_FILES + MIN_CONNECTIONS
        message = f"the process may open {open_files} files and needs at least {least}; raise it with ulimit -n"
        raise CommandError("too_few_files", message, ExitCode.USAGE)
    if asked.total <= room:
        return asked
    return ConnectionLimits(room, min(asked.each, max(room // 2, asked.each * room // asked.total)))

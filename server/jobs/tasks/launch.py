"""Runs between the worker and a command: records the process ids, waits, records the exit code. Imports little.

`python -I -S launch.py FOLDER NAME NICE -- COMMAND...`. The lock that means "running" is a file descriptor inherited by
this process and by the command, so it is held as long as either lives, also after the death of the worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress

BEGUN = b"1"  # a launcher writes it when its task has begun


def main() -> int:
    """Exits as the command did; its signals reach the command through the process group."""
    folder, name, nice, separator, *command = sys.argv[1:]
    assert separator == "--", sys.argv
    outlive_stop()  # a handler, unlike SIG_IGN, is not inherited by the command
    os.nice(int(nice))
    weigh_session(nice)
    pid = os.posix_spawn(command[0], command, os.environ)
    record(folder, name, pid)
    return wait(folder, name, pid)


def outlive_stop() -> None:
    """SIGTERM is for the command: this process stays until the command has ended."""
    signal.signal(signal.SIGTERM, lambda *_: None)


def weigh_session(nice: str) -> None:
    """If Linux groups processes by session, it weighs a process's niceness against that of its own session alone."""
    with suppress(OSError), open("/proc/self/autogroup", "w") as stream:  # there may be no such groups
        stream.write(nice)


def record(folder: str, name: str, pid: int) -> None:
    """The command's process id, and this process's, which is the group's."""
    _write(folder, f"{name}.pid", json.dumps({"group": os.getpid(), "pid": pid}))


def wait(folder: str, name: str, pid: int) -> int:
    """Until the command ends; records its exit code. Returns it as a shell would."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    _write(folder, f"{name}.exit", str(code))
    return code if code >= 0 else 128 - code


def _write(folder: str, name: str, text: str) -> None:
    scratch = os.path.join(folder, f".{name}.{os.getpid()}")
    with open(scratch, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, os.path.join(folder, name))


if __name__ == "__main__":
    sys.exit(main())

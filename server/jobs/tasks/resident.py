"""Keeps one resident process that has the imports of trainings and gates, and starts tasks as its forks. Knows no job.

Linux only, and not beside a GPU: a process that has used CUDA cannot fork. If it cannot start a task, the
executor starts a process for it, as it does without a resident process.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.jobs.tasks import launch

logger = logging.getLogger(__name__)

PYTHON = (sys.executable, "-P", "-m")  # -P: no module of the current folder is taken
_MODULE = "server.jobs.tasks.resident_process"
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_PATIENCE_S = 900.0  # to import, and to load a base, before a task begins
_ATTEMPTS = 3  # one process may leave while it is asked, because it was idle, and be found gone once more


def can_be_resident() -> bool:
    """Whether this machine lets a process with torch in it fork."""
    return sys.platform == "linux" and not any(map(os.path.exists, _GPU_FILES))


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory; 0 if it has ended."""
    try:
        words = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if words else 0


@dataclass(frozen=True)
class Order:
    """A task as the resident process starts it. command: `python -P -m MODULE ARGUMENTS`."""

    folder: str
    name: str
    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Order:
        return cls(**json.loads(content))


@dataclass(eq=False)
class Resident:
    """modules: what `python -m` may be asked to run. idle_s: after so long without a task it leaves. nice: its own
    niceness, and that of its tasks."""

    modules: tuple[str, ...]
    idle_s: float
    nice: int
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _process: subprocess.Popen[bytes] | None = None
    _socket: socket.socket | None = None
    _is_broken: bool = False

    def runs(self, command: Sequence[str]) -> bool:
        """Whether it can start this command."""
        return not self._is_broken and tuple(command[:3]) == PYTHON and command[3] in self.modules

    def open(self) -> None:
        """Start the process, unless it is there. It imports meanwhile."""
        with self._mutex:
            self._connected()

    def begin(self, order: Order, lock: int, log: int) -> bool:
        """Start the task with these open files. False: it was not started, or its lock is held by what was."""
        for _ in range(_ATTEMPTS):
            reader, writer = os.pipe()
            try:
                self._send(order, (lock, log, writer))
            finally:
                os.close(writer)
            if self._has_begun(reader):
                return True
        self._is_broken = True
        logger.warning("the resident process cannot start tasks; each starts as a process of its own from now on")
        self.close()
        return False

    def close(self) -> None:
        """Let it leave; tasks that it has started continue."""
        with self._mutex:
            self._drop()

    def _send(self, order: Order, files: tuple[int, int, int]) -> None:
        """To a new process the next time, if this one has left."""
        with self._mutex:
            try:
                socket.send_fds(self._connected(), [order.to_bytes()], files)
            except OSError as error:
                logger.debug("the resident process has left: %s", error)
                self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None

    def shared_bytes(self) -> int:
        """Memory that it holds, which its tasks need not take again."""
        process = self._process
        return 0 if process is None else memory_of(process.pid)

    def _has_begun(self, reader: int) -> bool:
        """Waits for the word of the task's launcher; the pipe ends without one if no launcher has it any more."""
        try:
            if select.select([reader], [], [], _PATIENCE_S)[0]:
                return os.read(reader, 1) == launch.BEGUN
            logger.warning("the resident process did not start a task within %g s", _PATIENCE_S)
            self.close()
            return False
        finally:
            os.close(reader)

    def _connected(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._drop()
        if self._process is None or self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            words = ("--socket", str(theirs.fileno()), "--idle-s", str(self.idle_s), "--nice", str(self.nice))
            with theirs:
                self._process = subprocess.Popen(
                    [*PYTHON, _MODULE, *words, *self.modules],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            self._socket = ours
        return self._socket

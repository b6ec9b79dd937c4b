"""The processes of the further ranks, as the first one holds them. Knows pipes and exit codes; knows no tensors."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

from server.engine.device_fault import DeviceLost
from server.engine.tensor_parallel.messages import Message, Stop, packed

START_LIMIT_S = 120.0  # of a process that imports torch
STOP_LIMIT_S = 5.0
_MODULE = "server.engine.tensor_parallel.follower"

_log = logging.getLogger(__name__)


class Followers:
    """Ranks 1.. of `size`, one process each on `devices`. They end with this process, whatever ends it.

    timeout_s: the longest that a rank may keep the others waiting.
    """

    def __init__(self, devices: Sequence[str], *, timeout_s: float) -> None:
        self.size = 1 + len(devices)
        self.timeout_s = timeout_s
        self.failure: str | None = None  # why no later step can succeed
        self._folder = Path(tempfile.mkdtemp(prefix="multilora-ranks-"))
        self.rendezvous = self._folder / "store"
        self._connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._watcher: threading.Thread | None = None
        self._is_closing = False
        try:
            for rank, device in enumerate(devices, start=1):
                self._start(rank, device)
            self.wait_for_all(START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, device: str) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.timeout_s))
        with theirs:
            fd, own = theirs.fileno(), [str(rank), str(self.size), str(self.rendezvous), str(self.timeout_s), device]
            command = [sys.executable, "-P", "-m", _MODULE, str(fd), *own]
            self._connections.append(Connection(ours.detach()))
            # A session of its own: Ctrl-C in a terminal reaches the first rank alone, which drains first
            process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, start_new_session=True)
            self.processes.append(process)

    def send_to_all(self, message: Message) -> None:
        """Raises DeviceLost if one is gone."""
        data = packed(message)
        for rank in range(1, self.size):
            self._send(rank, data)

    def send(self, rank: int, message: Message) -> None:
        """Raises DeviceLost if it is gone."""
        self._send(rank, packed(message))

    def wait_for_all(self, limit_s: float | None = None) -> None:
        """See `answer`."""
        for rank in range(1, self.size):
            self.answer(rank, limit_s)

    def answer(self, rank: int, limit_s: float | None = None) -> None:
        """Wait until it has done what it was given. Raises DeviceLost with its error."""
        connection = self._connections[rank - 1]
        try:
            if not connection.poll(limit_s):
                raise DeviceLost(self._fail(f"rank {rank} of {self.size} did not start within {limit_s:g} s"))
            error = connection.recv_bytes().decode()
        except (EOFError, OSError):
            error = self._how_it_ended(rank)
        if error:
            raise DeviceLost(self._fail(f"rank {rank} of {self.size}: {error}"))

    def watch(self, on_failure: Callable[[DeviceLost], object]) -> None:
        """From now on a rank that ends is noticed at once, also while nothing runs. on_failure: called once, on a
        thread."""
        self._watcher = threading.Thread(target=self._watch, args=(on_failure,), name="rank-watch", daemon=True)
        self._watcher.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A forward that all ranks take part in. If it fails on one, the others wait for sums that never come: no later
        one can succeed."""
        try:
            yield
        except Exception as error:
            self._fail(f"a step that {self.size} ranks share failed: {type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """End all of them."""
        self._is_closing = True
        for connection in self._connections:
            try:
                connection.send_bytes(packed(Stop()))
            except OSError:
                _log.debug("a rank was gone before it was stopped")
        for process in self.processes:
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher is not None:
            self._watcher.join()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, rank: int, data: bytes) -> None:
        try:
            self._connections[rank - 1].send_bytes(data)
        except OSError as error:
            raise DeviceLost(self._fail(f"rank {rank} of {self.size}: {self._how_it_ended(rank)}")) from error

    def _watch(self, on_failure: Callable[[DeviceLost], object]) -> None:
        ended = wait(self._connections)  # a rank says nothing more, so what can be read is its error or its end
        if self._is_closing:
            return
        rank = 1 + self._connections.index(ended[0])  # type: ignore[arg-type]
        try:
            self.answer(rank)
        except DeviceLost as error:
            _log.critical("%s", error)
            on_failure(error)

    def _fail(self, reason: str) -> str:
        """Keep the first reason: the others follow from it."""
        self.failure = self.failure or reason
        return reason

    def _how_it_ended(self, rank: int) -> str:
        try:
            return f"ended with exit code {self.processes[rank - 1].wait(STOP_LIMIT_S)}"
        except subprocess.TimeoutExpired:
            return "takes nothing any more"


def _timeval(seconds: float) -> bytes:
    """As SO_SNDTIMEO takes it."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))

"""Starts the product's processes by fork from one that has imported torch and transformers: 9 s of CPU less a start.

Where FORK is in the environment pytest forks a server before its first test: one thread, nothing of a test in it. Then
`subprocess.Popen` of one of PROGRAMS asks that server. The process is a child of the asking one, with the arguments,
environment, folder, file descriptors, session and signals of `Popen`'s call, and it has a server of its own for the
processes that it starts.
All other commands, and those whose environment differs in what is read at import (AT_IMPORT), are executed.
With EXECUTE in its environment a process is executed, and all that it starts. Linux only.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from support.processes.forked import Start, become, close_all_but, settle

FORK = "MULTILORA_TESTS_FORK"
EXECUTE = "MULTILORA_TESTS_EXECUTE"
COMMANDS = "from server.cli.main import main; main()"
PROGRAMS = frozenset({"trainer", "server.jobs.worker.worker", "server.jobs.gate.process", "torch.distributed.run"})
PROGRAMS |= {COMMANDS, "benchmarks.serving.server_process"}
SCRIPTS = frozenset({"sharded_runs.py", "job_server.py", "served_process.py", "multilora"})
AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "TRITON_", "HF_", "TRANSFORMERS_", "CUDA_", "LD_", "LANG", "LC_")
AT_START = ("PYTHONPATH", "PYTHONSAFEPATH")  # these a forked process follows
_AS_IT_COMES = {"executable": None, "preexec_fn": None, "close_fds": True, "shell": False, "process_group": -1}
_AS_IT_COMES |= {"gid": None, "gids": None, "uid": None, "umask": -1}
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_PR_SET_CHILD_SUBREAPER = 36
_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_signature = inspect.signature(_execute)
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def is_program(command: Sequence[str]) -> bool:
    """Whether a command line starts one of PROGRAMS or SCRIPTS, perhaps through the launcher of jobs."""
    python, *words = command
    if python != sys.executable:
        return python == str(Path(sys.executable).with_name("multilora"))
    if words[:2] == ["-I", "-S"] and words[2].endswith("/jobs/tasks/launch.py"):
        return is_program(words[words.index("--") + 1 :])
    words = [word for word in words[:2] if word not in ("-P", "-u")] + words[2:]
    if words[0] in ("-m", "-c"):
        return words[1] in PROGRAMS
    return words[0].rpartition("/")[2] in SCRIPTS


class ForkServer:
    """The asking side. One for each process; the server ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._imported_with = _at_import(os.environ)
        self._socket, theirs = socket.socketpair()
        ready, started = os.pipe()
        if os.fork() == 0:
            _serve(theirs, started)
        theirs.close()
        os.close(started)
        os.read(ready, 1)  # it holds none of our descriptors from here on
        os.close(ready)

    def install(self) -> None:
        """From now on `subprocess` starts the programs by it, until `uninstall`."""

        def execute_child(popen: subprocess.Popen[Any], *arguments: Any) -> None:
            asked = _signature.bind(popen, *arguments).arguments
            if self._takes(asked):
                self._start(popen, asked)
            else:
                _execute(popen, *arguments)

        subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]

    @staticmethod
    def uninstall() -> None:
        subprocess.Popen._execute_child = _execute  # type: ignore[attr-defined]

    def _takes(self, asked: Mapping[str, Any]) -> bool:
        command, environment = asked["args"], os.environ if asked["env"] is None else asked["env"]
        if EXECUTE in environment or isinstance(command, str | bytes | os.PathLike):
            return False
        is_plain = all(asked[name] == value for name, value in _AS_IT_COMES.items())
        is_ours = is_plain and is_program([os.fsdecode(word) for word in command])
        return is_ours and _at_import(environment) == self._imported_with

    def _start(self, popen: subprocess.Popen[Any], asked: Mapping[str, Any]) -> None:
        streams = enumerate(asked[name] for name in ("p2cread", "c2pwrite", "errwrite"))
        given = {number: number if pipe == -1 else pipe for number, pipe in streams}
        given |= {number: number for number in asked["pass_fds"]}
        start = Start(
            command=[os.fsdecode(word) for word in asked["args"]],
            environment=dict(os.environ if asked["env"] is None else asked["env"]),
            folder=os.getcwd() if asked["cwd"] is None else os.fspath(asked["cwd"]),
            new_session=bool(asked["start_new_session"]),
            numbers=list(given),
        )
        popen.pid = self.start(start, list(given.values()))
        popen._child_created = True  # type: ignore[attr-defined]
        popen._close_pipe_fds(*(asked[name] for name in _PIPES))  # type: ignore[attr-defined]

    def start(self, start: Start, descriptors: list[int]) -> int:
        """The process id. descriptors: what the process has at start.numbers."""
        body = pickle.dumps(start)
        with self._lock:
            # What forks the process ends at once. While this is set the orphan is ours, as if it were started here.
            assert _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, "no adoption of orphans here"
            try:
                socket.send_fds(self._socket, [struct.pack("!I", len(body))], descriptors)
                self._socket.sendall(body)
                return int(struct.unpack("!I", _read(self._socket, 4))[0])
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    read = {name: value for name, value in environment.items() if name.startswith(AT_IMPORT)}
    return {name: value for name, value in read.items() if name not in AT_START}


def _read(connection: socket.socket, count: int) -> bytes:
    """Raises EOFError."""
    body = b""
    while len(body) < count:
        part = connection.recv(count - len(body))
        if not part:
            raise EOFError
        body += part
    return body


def _serve(connection: socket.socket, started: int) -> NoReturn:
    """A start for each request, until the asking process has ended."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # sent to a group, they mean the others
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        close_all_but({0, 1, 2, connection.fileno(), started})
        os.write(started, b".")
        os.close(started)
        while True:
            _fork_as_asked(connection)
    finally:
        os._exit(0)


def _fork_as_asked(connection: socket.socket) -> None:
    """Raises EOFError once the asking process has ended."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 64)
    if not head:
        raise EOFError
    start: Start = pickle.loads(_read(connection, struct.unpack("!I", head)[0]))
    told, tells = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid == 0:
            connection.detach()  # its number may be one that the process gets
            _run(start, descriptors)
        os.write(tells, struct.pack("!I", pid))
        os._exit(0)
    os.waitpid(middle, 0)
    connection.sendall(os.read(told, 4))
    for number in (told, tells, *descriptors):
        os.close(number)


def _run(start: Start, descriptors: list[int]) -> NoReturn:
    try:
        settle(start, descriptors)
        ForkServer().install()
        become(start, _run)
    except BaseException:  # noqa: BLE001  a fork must never go on as the process that it was forked from
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(70)

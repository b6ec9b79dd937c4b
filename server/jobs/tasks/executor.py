"""What a job's heavy steps run as, and the executor of subprocesses on this machine. Knows commands; knows no job.

A command outlives the worker that started it: the next worker finds it by its folder, follows it, or ends it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from adapters_store.storage.blobs import disk_full_is_an_answer
from server.jobs.settings import SUBPROCESS
from server.jobs.tasks import launch
from server.jobs.tasks.resident import PYTHON, Order, Resident


@dataclass(frozen=True)
class Task:
    """A command with a folder of its own files: NAME.lock, NAME.pid, NAME.exit and NAME.log. name: "train", "gate".

    nodes, ranks: machines, and processes on each of them, that run the command together.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1
    ranks: int = 1

    def file(self, suffix: str) -> Path:
        """One of its own files; an executor may have one of its kind beside those above."""
        return self.folder / f"{self.name}.{suffix}"

    def remembered(self, suffix: str) -> str | None:
        """The text of one of its own files; None if there is no such file."""
        try:
            return self.file(suffix).read_text().strip()
        except FileNotFoundError:
            return None

    @property
    def on_one_node(self) -> tuple[str, ...]:
        """The command that starts all ranks of one machine: torchrun, if there are several."""
        if self.ranks == 1:
            return self.command
        torchrun = (self.command[0], "-P", "-m", "torch.distributed.run", "--standalone")
        return (*torchrun, "--nproc-per-node", str(self.ranks), "--no-python", *self.command)


@dataclass(frozen=True, slots=True)
class TaskState:
    """exit_code: of the last run, negative for a signal; None while it runs, before it began, and if it is unknown:
    the machine, or every process of the task, was stopped."""

    is_running: bool
    exit_code: int | None = None


class ExecutorUnavailable(Exception):
    """What runs the tasks does not answer now; they may be running all the same."""


class Executor(Protocol):
    """`start` does nothing if the task runs already. `stop` sends SIGTERM, `kill` SIGKILL.

    kind: as in a job's row. is_remote: tasks run on other machines, and continue when this one is stopped.
    All raise ExecutorUnavailable.
    """

    @property
    def kind(self) -> str: ...
    @property
    def is_remote(self) -> bool: ...

    def start(self, task: Task) -> None: ...
    def state(self, task: Task) -> TaskState: ...
    def stop(self, task: Task) -> None: ...
    def kill(self, task: Task) -> None: ...


class SubprocessExecutor:
    """Runs tasks on this machine, each in a session of its own. nice: their niceness, above the server's. resident:
    starts those tasks that it can; None: each is a process of its own."""

    kind, is_remote = SUBPROCESS, False

    def __init__(self, nice: int = 5, resident: Resident | None = None) -> None:
        self._nice = nice
        self._resident = resident
        self._children: dict[tuple[Path, str], subprocess.Popen[bytes]] = {}

    def start(self, task: Task) -> None:
        """Raises StoreError (disk_full), OSError."""
        assert task.nodes == 1, "a job for several machines was accepted for this one"
        with disk_full_is_an_answer():
            if not self._begin(task, self._fork):
                self._begin(task, self._spawn)

    def _begin(self, task: Task, start: Callable[[Task, int], bool]) -> bool:
        """Whether the task runs, by `start` or already. The lock is taken again each time: a start that failed may have
        left a process that holds it."""
        lock = os.open(task.file("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(lock, fcntl.LOCK_EX):
                return True
            for leftover in ("pid", "exit"):
                task.file(leftover).unlink(missing_ok=True)
            return start(task, lock)
        finally:
            os.close(lock)

    def _fork(self, task: Task, lock: int) -> bool:
        resident = self._resident
        if resident is None:
            return False
        if task.ranks > 1 or not resident.runs(task.command):
            resident.close()  # its memory is for this task
            return False
        module, *arguments = task.command[len(PYTHON) :]
        order = Order(str(task.folder), task.name, module, arguments, task.environment)
        with task.file("log").open("ab") as log:
            return resident.begin(order, lock, log.fileno())

    def _spawn(self, task: Task, lock: int) -> bool:
        head = [sys.executable, "-I", "-S", launch.__file__, str(task.folder), task.name, str(self._nice), "--"]
        with task.file("log").open("ab") as log:
            self._children[task.folder, task.name] = subprocess.Popen(
                [*head, *task.on_one_node],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **task.environment},
                pass_fds=(lock,),
                start_new_session=True,
            )
        return True

    def shared_bytes(self) -> int:
        """Memory of the resident process, which a task that it starts need not take again."""
        return 0 if self._resident is None else self._resident.shared_bytes()

    def state(self, task: Task) -> TaskState:
        child = self._children.get((task.folder, task.name))
        if child is not None and child.poll() is not None:  # and so reaped
            self._children.pop((task.folder, task.name), None)
        if is_locked(task.file("lock")):
            return TaskState(is_running=True)
        code = task.remembered("exit")
        return TaskState(is_running=False, exit_code=None if code is None else int(code))

    def stop(self, task: Task) -> None:
        self._signal(task, signal.SIGTERM)

    def kill(self, task: Task) -> None:
        self._signal(task, signal.SIGKILL)

    def _signal(self, task: Task, number: signal.Signals) -> None:
        """To the whole group, and only while its lock is held: the number may have been reused since."""
        if not is_locked(task.file("lock")):
            return
        group = self._group(task)
        if group is not None:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return  # it ended meanwhile

    def _group(self, task: Task) -> int | None:
        """None if a killed process started the task a moment ago: the launcher writes its number soon."""
        try:
            return int(json.loads(task.file("pid").read_text())["group"])
        except FileNotFoundError:
            child = self._children.get((task.folder, task.name))
            return None if child is None else child.pid


def wait_until_ended(executor: Executor, task: Task, timeout_s: float) -> bool:
    """Whether the task has ended within the time."""
    deadline_s = time.monotonic() + timeout_s
    while executor.state(task).is_running:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock file."""
    with _opened(path) as descriptor:
        return descriptor is not None and not _lock(descriptor, fcntl.LOCK_SH)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)

"""The resident process: imports once, then starts each task as a fork. Ends when its worker does, when it has been
idle for long, and when it is idle and less memory is free than it holds.

`python -P -m server.jobs.tasks.resident_process --socket FD --idle-s S --nice N MODULE...`. An order comes as one
message with three open files: the task's lock, its log, and a pipe for the word that it has begun.

Each order becomes two processes, as from launch.py: a launcher in a session of its own, which records process ids and
the exit code, and the task, which shares the imported modules until it writes to them. Both outlive this process.

It may fork because it stays one thread that never computes: torch's compute threads, and the autograd engine's, would
be missing in a fork, and the first parallel region there would wait for them for ever. So torch has one thread here, no
gradient is computed, and a task sets its own threads.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from lora_kernels.cgroups import free_host_bytes
from lora_kernels.process import hold_to_quota, map_large_blocks, unscanned_imports
from server.jobs.tasks import launch
from server.jobs.tasks.resident import Order, memory_of

_log = logging.getLogger(__name__)
_MESSAGE_BYTES = 1 << 17
_LOOK_S = 1.0  # between two looks for tasks, and for memory
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

Held = object  # what programs hold for their tasks; None: nothing


@dataclass(frozen=True)
class Program:
    """What `python -m MODULE` runs. By a task's arguments, keeps: whether what is held suits it; hold: what does."""

    main: Callable[[list[str], Held], int]
    keeps: Callable[[list[str], Held], bool] = lambda _arguments, _held: True
    hold: Callable[[list[str]], Held] = lambda _arguments: None

    @classmethod
    def of(cls, module: str) -> Program:
        """Of a module, or of a package's `__main__`: `main` and, if they are there, `keeps` and `hold`. `preload`, if
        it is there, imports what `main` would import late."""
        with unscanned_imports():
            found = importlib.import_module(module)
            if hasattr(found, "__path__"):
                found = importlib.import_module(f"{module}.__main__")
            if hasattr(found, "preload"):
                found.preload()
        return cls(found.main, getattr(found, "keeps", cls.keeps), getattr(found, "hold", cls.hold))


def _compute_alone() -> int:
    """No compute threads in this process. Returns how many torch had chosen; 1 if no program has imported it."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    return threads


def _set_up(threads: int) -> None:
    """In a task: threads as its environment says, or as many; random numbers of its own."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if torch:
        torch.set_num_threads(int(wanted) if wanted.isascii() and wanted.isdigit() else threads)
        torch.seed()
    if numpy:
        numpy.random.seed()


@dataclass(frozen=True)
class _Files:
    """The open files of an order."""

    lock: int
    log: int
    begun: int

    @property
    def is_awaited(self) -> bool:
        """Whether the worker still waits for the word. A task that began all the same could not be stopped by it."""
        poll = select.poll()
        poll.register(self.begun, 0)  # reports errors alone: a pipe that nothing reads any more
        return not poll.poll(0)

    def close(self) -> None:
        """This process's copies."""
        for each in (self.lock, self.log, self.begun):
            os.close(each)


class ResidentProcess:
    """programs: by module. threads: of a task whose environment says nothing."""

    def __init__(self, programs: Mapping[str, Program], threads: int) -> None:
        self._programs = programs
        self._threads = threads
        self._held: Held = None

    def serve(self, orders: socket.socket, idle_s: float) -> None:
        """Until the worker's end of the socket is closed, or for idle_s no order has come and no task has run."""
        self._share()
        while _is_asked(orders, idle_s):
            content, descriptors, *_ = socket.recv_fds(orders, _MESSAGE_BYTES, 3)
            if not content:
                return
            order, files = Order.from_bytes(content), _Files(*descriptors)
            if files.is_awaited:
                self._prepare(order)
            if files.is_awaited and os.fork() == 0:
                orders.close()
                self._launch(order, files)
            files.close()

    def _prepare(self, order: Order) -> None:
        """Hold what suits the order; nothing if that cannot be had, which the task itself reports."""
        program, arguments = self._programs[order.module], [*order.arguments]
        try:
            if program.keeps(arguments, self._held):
                return
            self._held = None
            gc.unfreeze()  # what was held may hang together in cycles
            gc.collect()
            self._held = program.hold(arguments)
        except Exception as error:  # noqa: BLE001  (whatever it is, the task meets it again)
            _log.info("nothing is held for %s: %s", order.folder, error)
        self._share()

    def _share(self) -> None:
        """A collection in a task would write to every object here, and so copy its page."""
        gc.collect()
        gc.freeze()

    def _launch(self, order: Order, files: _Files) -> NoReturn:
        """The launcher of one task: see launch.py."""
        code = 1
        try:
            os.setsid()
            launch.weigh_session(str(os.nice(0)))
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for output in (1, 2):
                os.dup2(files.log, output)
            os.close(files.log)
            pid = os.fork()
            if pid == 0:
                os.close(files.begun)
                self._run(order)
            launch.outlive_stop()
            self._record(order, pid)
            with suppress(OSError):  # the worker has ended meanwhile; the next one finds the task by its lock
                os.write(files.begun, launch.BEGUN)
            os.close(files.begun)
            code = launch.wait(order.folder, order.name, pid)
        except BaseException:  # noqa: BLE001  (a fork must never return into its parent's code)
            traceback.print_exc()
        finally:
            os._exit(code)

    def _record(self, order: Order, pid: int) -> None:
        """As launch.record. If it fails, the worker starts the task again: so this one must not continue beside it."""
        try:
            launch.record(order.folder, order.name, pid)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _run(self, order: Order) -> NoReturn:
        """The task: its program to the end, in this process, which then ends as an interpreter does."""
        code: object = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(order.environment)
            sys.argv = [order.module, *order.arguments]
            _set_up(self._threads)
            code = self._programs[order.module].main([*order.arguments], self._held)
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001  (as an interpreter would end)
            traceback.print_exc()
        finally:
            _end(code)


def _is_asked(orders: socket.socket, idle_s: float) -> bool:
    """Whether there is something to read, waiting while tasks run, and while none does for idle_s, or until others need
    the memory."""
    leave_s, wait_s = time.monotonic() + idle_s, min(idle_s, _LOOK_S)
    while not select.select([orders], [], [], wait_s)[0]:
        if _has_children():
            leave_s = time.monotonic() + idle_s
        elif time.monotonic() >= leave_s or _is_memory_short():
            return False
        wait_s = _LOOK_S
    return True


def _is_memory_short() -> bool:
    """Whether less is free than this process holds."""
    free = free_host_bytes()
    return free is not None and free < memory_of(os.getpid())


def _has_children() -> bool:
    """Whether a launcher lives. The system reaps them, so none is ever returned here."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _end(code: object) -> NoReturn:
    try:
        atexit._run_exitfuncs()  # of what the task has opened
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(int(code) if isinstance(code, int) else 0 if code is None else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.jobs.tasks.resident_process", description=__doc__)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--idle-s", type=float, required=True)
    parser.add_argument("--nice", type=int, required=True)
    parser.add_argument("modules", nargs="+")
    given = parser.parse_args(arguments)
    os.nice(given.nice)
    launch.weigh_session(str(given.nice))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are reaped by the system
    hold_to_quota()
    map_large_blocks()
    programs = {module: Program.of(module) for module in given.modules}
    threads = _compute_alone()
    ResidentProcess(programs, threads).serve(socket.socket(fileno=given.socket), given.idle_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())

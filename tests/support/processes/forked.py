"""Turns a process that was forked into the one that a command line would have started."""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import logging
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Start:
    """numbers: the file descriptors that the process has."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    numbers: list[int]


Run = Callable[[Start, list[int]], NoReturn]


def settle(start: Start, descriptors: list[int]) -> None:
    """All but the program: session, file descriptors, folder, environment, signals, streams; nothing of pytest's."""
    if start.new_session:
        os.setsid()
    _take(start.numbers, descriptors)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with suppress(OSError, ValueError):  # two belong to the C library
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _forget_pytest()
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # type: ignore[misc]
    errors = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = errors  # type: ignore[misc]
    _settle_logging()


def _take(numbers: list[int], descriptors: list[int]) -> None:
    """Have `descriptors` at `numbers`, and no others."""
    above = max(256, *numbers) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for number, descriptor in zip(numbers, moved, strict=True):
        os.dup2(descriptor, number)
    close_all_but(set(numbers))


def close_all_but(keep: set[int]) -> None:
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - keep:
        with suppress(OSError):  # the listing's own
            os.close(number)


def _forget_pytest() -> None:
    faulthandler.disable()
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _settle_logging() -> None:
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if "stream" in vars(handler) and not isinstance(handler, logging.FileHandler):
            vars(handler)["stream"] = sys.stderr


def become(start: Start, run: Run) -> NoReturn:
    """Run the program and end the process. run: for the process that a launcher starts in its turn."""
    code = 1
    try:
        code = _exit_code(start, run)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _exit_code(start: Start, run: Run) -> int:
    """After the program, its threads and its exit handlers."""
    code: object = None
    try:
        _program(start, run)
    except SystemExit as exit_:
        code = exit_.code
    except Exception:  # noqa: BLE001  what the interpreter does with one that nothing caught
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr, flush=True)  # before the exit handlers, which may close it
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return (code or 0) & 0xFF


def _program(start: Start, run: Run) -> None:
    python, *words = start.command
    sys.orig_argv[:] = start.command
    sys.modules["__main__"] = types.ModuleType("__main__")
    own = [folder for folder in start.environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*own, *(folder for folder in sys.path if folder not in ("", str(TESTS)))]
    if python != sys.executable:
        words = start.command
    is_isolated = words[0] in ("-I", "-P") or bool(start.environment.get("PYTHONSAFEPATH"))
    if "-u" in words[:2]:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    while words[0] in ("-I", "-S", "-P", "-u"):
        del words[0]
    if words[0].endswith("/launch.py"):
        os.posix_spawn = _posix_spawn(start, run)  # type: ignore[assignment]
    if words[0] not in ("-m", "-c"):
        _script(words, is_isolated)
        return
    sys.argv = words[1:]
    if not is_isolated:
        sys.path.insert(0, start.folder)
    if words[0] == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
        return
    sys.modules.pop(sys.argv[0], None)  # or runpy warns
    runpy._run_module_as_main(sys.argv[0])  # type: ignore[attr-defined]


def _script(words: list[str], is_isolated: bool) -> None:
    sys.argv = words
    if not is_isolated:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


def _posix_spawn(start: Start, run: Run) -> Callable[[str, list[str], Any], int]:
    """For the launcher of jobs, which has one thread: the command is a fork of it."""

    def spawn(_path: str, command: list[str], environment: Any) -> int:
        pid = os.fork()
        if pid == 0:
            own = replace(start, command=command, environment=dict(environment), folder=os.getcwd())
            run(replace(own, new_session=False), start.numbers)
        return pid

    return spawn

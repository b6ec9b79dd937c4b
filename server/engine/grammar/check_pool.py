"""Keeps checker processes (see `checker`), and gives each tenant at most one at a time. Any thread may use it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import Pipe

from server.engine.grammar.refusals import CRASHED, TIMED_OUT, Refusal
from server.engine.grammar.spec import GrammarSpec
from server.engine.grammar.tokens import TokenTable

TIME_LIMIT_S = 2.0
_START_LIMIT_S = 60.0
_NUM_PROCESSES = 2  # a tenant whose grammars crash one leaves the other to the rest


class _Checker:
    def __init__(self, table: TokenTable) -> None:
        self._connection, theirs = Pipe()
        fd = theirs.fileno()
        command = [sys.executable, "-P", "-m", "server.engine.grammar.checker", str(fd)]
        self.process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs.close()
        try:
            self._connection.send_bytes(table.to_json().encode())
            if not self._connection.poll(_START_LIMIT_S):
                raise TimeoutError("the process that checks grammars did not start in time")
            self._connection.recv_bytes()
        except BaseException:
            self.kill()
            raise

    def ask(self, spec: GrammarSpec) -> str | Refusal:
        """After CRASHED and TIMED_OUT the process is gone."""
        try:
            self._connection.send_bytes(json.dumps(asdict(spec)).encode())
            if not self._connection.poll(TIME_LIMIT_S):
                self.kill()
                return TIMED_OUT
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.kill()
            return CRASHED
        return Refusal(*answer["refusal"]) if "refusal" in answer else str(answer["form"])

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()


class CheckPool:
    """Processes start when they are first needed."""

    def __init__(self, table: Callable[[], TokenTable]) -> None:
        self._table = table
        self._changed = threading.Condition()
        self._idle: list[_Checker] = []
        self._num_taken = 0
        self._busy: set[str] = set()  # tenants
        self._is_closed = False

    def check(self, tenant: str, spec: GrammarSpec) -> str | Refusal:
        """The grammar's compiled form, or why it is refused. Waits for a free process."""
        with self._turn(tenant):
            checker = self._take()
            try:
                return checker.ask(spec)
            finally:
                self._put_back(checker)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for checker in idle:
            checker.kill()

    @contextmanager
    def _turn(self, tenant: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: tenant not in self._busy and self._num_taken < _NUM_PROCESSES)
            self._busy.add(tenant)
            self._num_taken += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(tenant)
                self._num_taken -= 1
                self._changed.notify_all()

    def _take(self) -> _Checker:
        with self._changed:
            while self._idle:
                checker = self._idle.pop()
                if checker.is_alive:
                    return checker
                checker.kill()
        return _Checker(self._table())

    def _put_back(self, checker: _Checker) -> None:
        with self._changed:
            if checker.is_alive and not self._is_closed:
                self._idle.append(checker)
                return
        checker.kill()

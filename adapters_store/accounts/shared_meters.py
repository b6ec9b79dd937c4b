"""Counts tenants' rates and running sequences together with the other servers on one PostgreSQL. Knows no HTTP.

One thread and one connection: the calls of this server come one after the other, so its own number of running sequences
is written as it is, not as a difference, and a database that lost the unlogged rows has it again at the next call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from adapters_store.accounts import meter_rows
from adapters_store.accounts.meter_rows import LIFE_S, Amounts, Levels, Take
from adapters_store.accounts.records import Quotas
from adapters_store.storage.database import make_engine

_log = logging.getLogger(__name__)

_BEAT_S = LIFE_S / 3
_RETRY_S = 0.5

Answer = Callable[[Levels | None], None]


@dataclass(slots=True)
class _Running:
    """Sequences of one tenant on this server, and the quotas that they were admitted with."""

    number: int
    quotas: Quotas


class SharedMeters:
    """`take` answers on the meters' own thread; with None while the database does not answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._server = uuid4().hex
        self._queue: queue.SimpleQueue[tuple[Take, Answer] | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._beaten_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="meters", daemon=True)

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    def start(self, *, patience_s: float = 2.0) -> None:
        """Returns once it is connected, or after patience_s."""
        self._thread.start()
        self._connected.wait(patience_s)

    def stop(self) -> None:
        """After what was asked for before; running sequences of this server no longer count."""
        self._stopping.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def take(self, wanted: Take, answer: Answer) -> None:
        if self._connected.is_set():
            self._queue.put((wanted, answer))
        else:
            answer(None)

    def give_back(self, tenant: str, quotas: Quotas, amounts: Amounts) -> None:
        """What a call took and did not use, and the sequences that have ended."""
        self._queue.put((Take(tenant=tenant, quotas=quotas, takes=-amounts), lambda _: None))

    def _run(self) -> None:
        engine = make_engine(self._url, pool_size=1, max_overflow=0)
        while not self._stopping.is_set():
            try:
                self._serve(engine)
            except DBAPIError as error:
                if self._connected.is_set():
                    _log.warning("this server counts quotas by itself until the database takes them: %s", error.orig)
            finally:
                self._connected.clear()
            engine.dispose()
            self._refuse_waiting()
            self._stopping.wait(_RETRY_S)

    def _serve(self, engine: Engine) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            self._beat(connection)  # a database that crashed has forgotten what runs here
            self._connected.set()
            while True:
                left_s = self._beaten_s + _BEAT_S - time.monotonic()
                if left_s <= 0.0:
                    self._beat(connection)
                    continue
                with suppress(queue.Empty):
                    call = self._queue.get(timeout=left_s)
                    if call is None:
                        self._leave(connection)
                        return
                    self._answer(connection, *call)

    def _answer(self, connection: Connection, wanted: Take, answer: Answer) -> None:
        levels: Levels | None = None
        try:
            levels = self._take(connection, wanted)
        finally:  # a database that does not answer ends the connection, and this call has its answer
            answer(levels)

    def _take(self, connection: Connection, wanted: Take) -> Levels | None:
        own = self._running.setdefault(wanted.tenant, _Running(0, wanted.quotas))
        own.quotas = wanted.quotas
        if wanted.needs is None:  # known by now, even if the database will not know it
            self._count(wanted)
            wanted = replace(wanted, takes=replace(wanted.takes, sequences=0))
            return meter_rows.take(connection, self._server, own.number, wanted)
        levels = meter_rows.take(connection, self._server, own.number, wanted)
        if levels is not None and levels.is_taken:
            self._count(wanted)
        elif own.number == 0:
            del self._running[wanted.tenant]
        return levels

    def _count(self, wanted: Take) -> None:
        own = self._running.setdefault(wanted.tenant, _Running(0, wanted.quotas))
        own.number = max(0, own.number + wanted.takes.sequences)
        if own.number == 0:
            del self._running[wanted.tenant]

    def _refuse_waiting(self) -> None:
        """What waits for a database that is gone: calls are answered, what was given back is counted here."""
        with suppress(queue.Empty):
            while True:
                call = self._queue.get_nowait()
                if call is None:
                    return
                wanted, answer = call
                if wanted.needs is None:
                    self._count(wanted)
                answer(None)

    def _beat(self, connection: Connection) -> None:
        for tenant, own in list(self._running.items()):
            meter_rows.take(connection, self._server, own.number, Take(tenant=tenant, quotas=own.quotas))
        self._beaten_s = time.monotonic()

    def _leave(self, connection: Connection) -> None:
        for tenant, own in self._running.items():
            meter_rows.take(connection, self._server, 0, Take(tenant=tenant, quotas=own.quotas))

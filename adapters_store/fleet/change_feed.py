"""Announces changes of other processes at once: LISTEN on PostgreSQL, on one connection of its own. Knows no adapter.

`Database.write` sends the NOTIFY, which PostgreSQL delivers after the commit. Nothing depends on it: readers also look
for a new generation every half second, and a connection that does not deliver (a pooler between) costs only that time.
Source: https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from adapters_store.storage.database import CHANNEL, make_engine

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_WAKE_S = 0.25  # the longest time that `stop` waits for


class ChangeFeed:
    """A thread that calls `on_change` after each change that another process commits.

    sender: the payload of this process's own announcements, which are left out. The thread connects again whenever
    its connection is lost, and then calls once for what it may have missed.
    """

    def __init__(self, url: str, sender: str, on_change: Callable[[], None]) -> None:
        self._url = url
        self._sender = sender
        self._on_change = on_change
        self._stop = threading.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-listen", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        from psycopg import OperationalError  # an extra that only PostgreSQL needs

        engine = make_engine(self._url, pool_size=1, max_overflow=0)
        while not self._stop.is_set():
            with suppress(DBAPIError, OperationalError):
                self._listen(engine)
            if self._listening.is_set() and not self._stop.is_set():
                _log.warning("the connection that announces other servers' changes is lost; changes count in 0.5 s")
            self._listening.clear()
            engine.dispose()
            self._stop.wait(_RETRY_S)

    def _listen(self, engine: Engine) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"LISTEN {CHANNEL}")
            driver = connection.connection.driver_connection
            assert driver is not None
            self._listening.set()
            self._on_change()
            while not self._stop.is_set():
                heard = list(driver.notifies(timeout=_WAKE_S, stop_after=1))
                if any(notice.payload != self._sender for notice in heard):
                    self._on_change()

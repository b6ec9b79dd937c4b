"""Which of several servers answers the batches of one base: one at a time. Knows no batch.

On PostgreSQL it holds an advisory lock; beside SQLite a file lock. Both end with their process, so after `kill -9` the
next server continues at once. Two at once would waste work, and no more: a line is kept by its number.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, suppress
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from adapters_store.filesystem import tried_file_lock
from adapters_store.storage.database import Database, make_engine

_TAKE = text("SELECT pg_try_advisory_lock(:key)")
_STILL = text("SELECT 1")
_LEASE = text("SELECT set_config('idle_session_timeout', '60s', false)")  # of a host that is gone; asked every second


class Lead:
    """Used on one thread."""

    def __init__(self, database: Database, data_dir: Path, base_digest: str) -> None:
        digest = hashlib.sha256(base_digest.encode()).digest()
        self._database = database
        self._file = data_dir / f"batches-{digest.hex()[:16]}.lock"
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._held = ExitStack()
        self._connection: Connection | None = None
        self._has_file = False

    def holds(self) -> bool:
        """Whether this server leads now; it tries to, if none does."""
        return self._holds_lock() if self._database.is_shared else self._holds_file()

    def close(self) -> None:
        with suppress(SQLAlchemyError):
            self._held.close()
        self._connection, self._has_file = None, False

    def _holds_file(self) -> bool:
        if not self._has_file:
            with ExitStack() as attempt:
                self._has_file = attempt.enter_context(tried_file_lock(self._file))
                if self._has_file:
                    self._held = attempt.pop_all()
        return self._has_file

    def _holds_lock(self) -> bool:
        try:
            if self._connection is None:
                return self._takes_lock()
            self._connection.execute(_STILL)
        except SQLAlchemyError:
            self.close()
            return False
        return True

    def _takes_lock(self) -> bool:
        with ExitStack() as attempt:
            engine = make_engine(self._database.url, pool_size=1, max_overflow=0)
            attempt.callback(engine.dispose)
            connection = attempt.enter_context(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            connection.execute(_LEASE)
            if not connection.execute(_TAKE, {"key": self._key}).scalar_one():
                return False
            self._connection, self._held = connection, attempt.pop_all()
            return True

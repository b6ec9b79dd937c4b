"""Locks between processes: of one machine by flock, of every machine by PostgreSQL's advisory locks. Knows no blob."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from zlib import crc32

from sqlalchemy import Engine, NullPool, create_engine, text

from adapters_store.filesystem import file_lock, tried_file_lock
from adapters_store.storage.database_errors import as_store_errors
from adapters_store.storage.sessions import connect_limits, limit_sessions

_CLASS = 0x6D6C6F72  # PostgreSQL's locks have two numbers; this one is the product's
_WAIT_S = 60


class FileLocks:
    """flock on a file, between processes of one machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait for it, and hold it alone."""
        return file_lock(self._path, exclusive=True)

    def shared(self) -> AbstractContextManager[None]:
        """Wait for it, and hold it beside others that share it."""
        return file_lock(self._path, exclusive=False)

    def tried(self) -> AbstractContextManager[bool]:
        """Hold it alone if it is free at once. The block runs in any case, and is given whether it is held."""
        return tried_file_lock(self._path)


class AdvisoryLocks:
    """The same between machines, by PostgreSQL. Each lock has a connection of its own: one from the pool could wait for
    a holder that waits for the pool.

    A transaction holds it, so a lost connection or a killed process gives it back. Raises StoreUnavailable.
    """

    def __init__(self, url: str, name: str) -> None:
        self._engine = create_engine(url, poolclass=NullPool, connect_args=connect_limits(url))
        limit_sessions(self._engine, lock_timeout=f"{_WAIT_S}s", idle_in_transaction_session_timeout="0")
        self._keys = {"of": _CLASS, "key": crc32(name.encode()) - (1 << 31)}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._asked("pg_advisory_xact_lock"):
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._asked("pg_advisory_xact_lock_shared"):
            yield

    def tried(self) -> AbstractContextManager[bool]:
        return self._asked("pg_try_advisory_xact_lock")

    @contextmanager
    def _asked(self, function: str) -> Iterator[bool]:
        with as_store_errors(writes=False), self._engine.begin() as connection:
            yield connection.execute(text(f"SELECT {function}(:of, :key)"), self._keys).scalar_one() is True


Locks = FileLocks | AdvisoryLocks


def locks_for(engine: Engine, folder: Path, name: str) -> Locks:
    """The lock `name` of a store whose rows are in `engine`; folder: where a file of this name may be."""
    if engine.dialect.name == "postgresql":
        return AdvisoryLocks(engine.url.render_as_string(hide_password=False), name)
    return FileLocks(folder / name)

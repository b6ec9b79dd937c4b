"""Opens the store's database and hands out transactions. Knows engines and pragmas; knows no adapter.

SQLite in WAL mode: readers never wait; a writer takes the lock when it begins (BEGIN IMMEDIATE), because a reader that
turns writer fails at once when another process wrote in between, whatever the busy timeout. Any SQLAlchemy URL works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text, update
from sqlalchemy.exc import OperationalError

from adapters_store.errors import StoreError
from adapters_store.filesystem import file_lock
from adapters_store.schema import HEAD_REVISION, store_state

_BUSY_TIMEOUT_S = 10
_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """A connection pool on migrated tables. `url` None: data_dir/multilora.db."""

    def __init__(self, data_dir: Path, url: str | None) -> None:
        self.engine = _make_engine(url or f"sqlite:///{data_dir / 'multilora.db'}")
        self._on_write: list[Callable[[], None]] = []
        with file_lock(data_dir / "migrate.lock", exclusive=True):
            _migrate(self.engine)

    def on_write(self, callback: Callable[[], None]) -> None:
        """Call back after each of this object's own commits."""
        self._on_write.append(callback)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self, *, changes_answers: bool = True) -> Iterator[Connection]:
        """One transaction: all of the block or nothing. StoreError (disk_full, read_only) where it cannot be written.

        changes_answers False: nothing that anybody remembers (a name's version, a key) changes with it.
        """
        try:
            with self.engine.connect().execution_options(multilora_write=True) as connection, connection.begin():
                yield connection
                if changes_answers:
                    connection.execute(update(store_state).values(generation=store_state.c.generation + 1))
        except OperationalError as error:
            code, reason = _refusal(str(error.orig))
            if code is None:
                raise
            raise StoreError(code, f"the database {reason}; nothing was stored") from error
        for callback in self._on_write if changes_answers else ():
            callback()

    def generation(self) -> int:
        """A number that changes with every write of any process."""
        with self.read() as connection:
            return int(connection.execute(select(store_state.c.generation)).scalar_one())

    def close(self) -> None:
        self.engine.dispose()


def _refusal(reason: str) -> tuple[str | None, str]:
    """What SQLite says of its disk, as a code. An I/O error is what a limit on the file's size looks like to it."""
    if "disk is full" in reason or "disk I/O error" in reason:
        return "disk_full", f"has no room on its disk ({reason})"
    if "readonly" in reason:
        return "read_only", "cannot be written"
    return None, reason


def _make_engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_size=16, pool_pre_ping=True)
    engine = create_engine(url, pool_size=16, connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # Python's sqlite3 must not begin transactions of its own
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("multilora_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(engine: Engine) -> None:
    with engine.connect().execution_options(multilora_write=True) as connection, connection.begin():
        found = _revision(connection)
        if found == HEAD_REVISION:
            return
        if found is not None and found > HEAD_REVISION:
            message = f"the database is at revision {found}, this program knows up to {HEAD_REVISION}"
            raise StoreError("database_newer", message)
        from alembic import command  # costs 100 ms, and only the first process to open a new store pays it
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD_REVISION)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def now_s() -> int:
    """Unix seconds, as the tables keep them."""
    return int(time.time())

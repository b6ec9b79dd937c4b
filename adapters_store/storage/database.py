"""Opens the store's database and hands out transactions. Knows engines and pragmas; knows no adapter.

SQLite in WAL mode: readers never wait; a writer takes the lock when it begins (BEGIN IMMEDIATE), because a reader that
turns writer fails at once when another process wrote in between, whatever the busy timeout. Any SQLAlchemy URL works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, select, text, update

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.filesystem import file_lock
from adapters_store.storage import store_id
from adapters_store.storage.answer_cache import AnswerCache
from adapters_store.storage.availability import DEFAULT_GRACE_S, Availability
from adapters_store.storage.database_errors import as_store_errors
from adapters_store.storage.schema import HEAD_REVISION, store_state
from adapters_store.storage.sessions import connect_limits, limit_sessions, require_own_sessions
from adapters_store.storage.store_id import BucketMark, Mark, StorePair

if TYPE_CHECKING:
    from alembic.config import Config

POLL_S = 0.5  # how old a remembered answer may be before its reader looks for other processes' changes
POOL_SIZE, MAX_OVERFLOW = 4, 4  # PostgreSQL's default limit is 100, for all servers and workers together
CHANNEL = "multilora"
_BUSY_TIMEOUT_S = 10
_MIGRATE_KEY = 0x6D756C74696C6F72  # any number, the same in every process
_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """A connection pool on migrated tables, proved to be those of `data_dir`. `url` None: data_dir/multilora.db.

    grace_s: how long remembered answers count while the database does not answer. poll_s: how long they count before
    other processes' changes are looked for; an announced change counts at once. bucket: where the blobs are, if not in
    `data_dir`. Raises StoreError (wrong_store, database_newer, pooler_shares_sessions). Whatever the database
    refuses later is a StoreError too; see `database_errors`.
    """

    def __init__(
        self,
        data_dir: Path,
        url: str | None,
        *,
        grace_s: float = DEFAULT_GRACE_S,
        poll_s: float = POLL_S,
        bucket: BucketMark | None = None,
    ) -> None:
        self.engine = make_engine(url or f"sqlite:///{data_dir / 'multilora.db'}")
        self.is_shared = self.engine.dialect.name == "postgresql"
        self.availability = Availability(grace_s)
        self.poll_s = poll_s
        self.sender = uuid4().hex
        self._turn = threading.Lock()
        self._on_change: list[Callable[[], None]] = []
        with file_lock(data_dir / "migrate.lock", exclusive=True), as_store_errors(writes=True):
            if self.is_shared:
                require_own_sessions(self.engine)
            self.pair = _joined(self.engine, data_dir, bucket)

    @property
    def url(self) -> str:
        """With its password."""
        return self.engine.url.render_as_string(hide_password=False)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back after each of this object's own commits, and for each change that was announced."""
        self._on_change.append(callback)

    def changed(self) -> None:
        """Remembered answers may be wrong now."""
        for callback in self._on_change:
            callback()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot. Raises StoreUnavailable (store_unavailable, data_dir_gone), StoreError (database_damaged)."""
        with self.availability.asking(), as_store_errors(writes=False):
            self.pair.require_folder()
            with self.engine.begin() as connection:
                yield connection

    @contextmanager
    def proven(self) -> Iterator[Connection]:
        """One snapshot of the rows that belong to the data directory: what is not in it may be removed there.

        Raises StoreError (wrong_store) and as `read`.
        """
        with self.read() as connection:
            self.pair.require(connection)
            yield connection

    @contextmanager
    def write(self, *, changes_answers: bool = True) -> Iterator[Connection]:
        """One transaction: all of the block or nothing. Raises StoreError (disk_full, read_only) and as `read`.

        changes_answers False: no remembered answer (a name's version, a key) changes with it.
        """
        with self._writers_turn(changes_answers), self.availability.asking(), as_store_errors(writes=True):
            self.pair.require_folder()
            with self.engine.connect().execution_options(multilora_write=True) as connection, connection.begin():
                if changes_answers:  # first: on PostgreSQL it makes one writer of many, as SQLite's lock does
                    connection.execute(select(store_state.c.generation).with_for_update())
                yield connection
                if changes_answers:
                    self._count_change(connection)
        if changes_answers:
            self.changed()

    @contextmanager
    def _writers_turn(self, changes_answers: bool) -> Iterator[None]:
        """On PostgreSQL one changing write at a time: those that wait for the row's lock hold no connection."""
        if not (self.is_shared and changes_answers):
            yield
            return
        if not self._turn.acquire(timeout=_BUSY_TIMEOUT_S):
            message = "other changes wait for the database too; nothing was stored, try again"
            raise StoreUnavailable("store_unavailable", message, is_away=False)
        try:
            yield
        finally:
            self._turn.release()

    def _count_change(self, connection: Connection) -> None:
        change = update(store_state).values(generation=store_state.c.generation + 1)
        if self.is_shared:
            change = change.returning(func.pg_notify(CHANNEL, self.sender))
        connection.execute(change)

    def generation(self) -> int:
        """A number that changes with every write of any process."""
        with self.read() as connection:
            return int(connection.execute(select(store_state.c.generation)).scalar_one())

    def generation_if_reachable(self) -> int | None:
        """For remembered answers: None while the database does not answer, until the grace is over."""
        try:
            return self.generation()
        except StoreUnavailable:
            if self.availability.is_lost():
                raise
            return None

    def answers(self) -> AnswerCache[Any, Any]:
        """A new memory for answers of this database."""
        cache: AnswerCache[Any, Any] = AnswerCache(self.generation_if_reachable, max_age_s=self.poll_s)
        self.on_change(cache.clear)
        return cache

    def close(self) -> None:
        self.engine.dispose()


def adopt(data_dir: Path, url: str | None, bucket: BucketMark | None = None) -> str:
    """Join a directory and a database (and a bucket) whatever their ids are; returns the id. Files that exist now are
    never swept."""
    engine = make_engine(url or f"sqlite:///{data_dir / 'multilora.db'}")
    with file_lock(data_dir / "migrate.lock", exclusive=True), as_store_errors(writes=True):
        mark = _opened(engine, lambda connection: store_id.adopt(connection, data_dir, in_bucket=bucket is not None))
        if bucket is not None:
            bucket.replace_id(mark)
        store_id.settle(mark, data_dir)
    engine.dispose()
    return mark.store_id


def _joined(engine: Engine, data_dir: Path, bucket: BucketMark | None) -> StorePair:
    file = Path(str(engine.url.database)) if engine.url.get_backend_name() == "sqlite" else None
    if file is not None and not file.exists():
        store_id.require_unmarked(data_dir)  # before SQLite makes the file
    if bucket is None:
        mark = _opened(engine, lambda connection: store_id.join(connection, data_dir))
    else:
        mark = _opened(engine, lambda connection: store_id.join_bucket(connection, data_dir, bucket))
        bucket.claim(mark)
    return StorePair(data_dir, store_id.settle(mark, data_dir), file)


def make_engine(url: str, *, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW) -> Engine:
    """pool_size and max_overflow: of a server's connections; SQLite's are files, and have a pool of their own size."""
    if not url.startswith("sqlite"):
        shared = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=_BUSY_TIMEOUT_S,
            pool_pre_ping=True,
            connect_args=connect_limits(url),
        )
        limit_sessions(shared, lock_timeout=f"{_BUSY_TIMEOUT_S}s")
        return shared
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


def _opened(engine: Engine, prove: Callable[[Connection], Mark]) -> Mark:
    """The tables as this program knows them, and the mark; one process at a time."""
    with engine.connect().execution_options(multilora_write=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":  # processes may have a folder each
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATE_KEY})
        _migrate(connection)
        return prove(connection)


def _migrate(connection: Connection) -> None:
    found = _revision(connection)
    if found == HEAD_REVISION:
        return
    if found is not None and found > HEAD_REVISION:
        message = f"the database is at revision {found}, this program knows up to {HEAD_REVISION}"
        raise StoreError("database_newer", message)
    from alembic import command  # costs 100 ms, and only the first process to open a new store pays it

    config = migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD_REVISION)


def migrations() -> Config:
    """Where alembic finds them."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("recursive_version_locations", "true")
    return config


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def now_s() -> int:
    """Unix seconds, as the tables keep them."""
    return int(time.time())

"""Which of many workers works: one, whatever the number of servers and hosts. Knows no job.

On PostgreSQL the leader holds an advisory lock of the database, on a connection of its own. The lock is a lease: the
leader asks at every tick, and the database ends a session that has been silent for `LEASE_S`. A leader that lost its
connection ends at once, since another may lead by then. Beside SQLite, which is a file of one host, a file lock does.

The lock belongs to a session: a pooler that shares sessions would break it, so `Database` refuses one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from adapters_store.filesystem import file_lock
from adapters_store.storage.database import Database, make_engine
from server.jobs.tasks.executor import is_locked
from server.jobs.worker.options import LOCK_FILE

LEASE_S = 30
_KEY = 0x6D6C6A6F6273  # any number, the same in every process
_TAKE = text("SELECT pg_try_advisory_lock(:key)")
_LEASE = text("SELECT set_config('idle_session_timeout', :lease, false), set_config('tcp_keepalives_idle', '5', false)")
_TAKEN = text(
    "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
    " AND classid::bigint = :high AND objid::bigint = :low"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)


def is_led(database: Database, data_dir: Path) -> bool:
    """Whether a worker works on these jobs, on any host. Raises StoreUnavailable."""
    if not database.is_shared:
        return is_locked(data_dir / LOCK_FILE)
    with database.read() as connection:
        return bool(connection.execute(_TAKEN, {"high": _KEY >> 32, "low": _KEY & 0xFFFF_FFFF}).scalar_one())


@contextmanager
def leading(data_dir: Path, url: str | None, *, tick_s: float, lost: Callable[[], None]) -> Iterator[None]:
    """Wait until no other worker leads, then lead for the length of the block.

    lost: called on a thread of its own when the database says no more that this worker leads.
    Raises sqlalchemy's DBAPIError: the database was away while this worker waited.
    """
    if url is None or url.startswith("sqlite"):
        with file_lock(data_dir / LOCK_FILE, exclusive=True):
            yield
        return
    engine = make_engine(url)
    done = threading.Event()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(_LEASE, {"lease": f"{LEASE_S}s"})
        while not connection.execute(_TAKE, {"key": _KEY}).scalar_one():
            done.wait(tick_s)
        watch = threading.Thread(target=_watch, args=(connection, done, tick_s, lost), name="job-leader", daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()


def _watch(connection: Connection, done: threading.Event, tick_s: float, lost: Callable[[], None]) -> None:
    while not done.wait(tick_s):
        try:
            connection.execute(text("SELECT 1"))
        except DBAPIError:
            lost()
            return

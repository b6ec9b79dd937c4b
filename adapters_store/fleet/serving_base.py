"""One base for all servers on one PostgreSQL: a server with another base is refused while one runs.

Names belong to tenants, not to a tenant and a base. Were two bases served from one database, an adapter that is pushed
for one would take its name from the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from sqlalchemy import ColumnClause, Connection, Float, delete, insert, literal_column, select, update

from adapters_store.errors import Conflict, StoreError
from adapters_store.storage.database import Database
from adapters_store.storage.schema import servers

LIFE_S = 15.0  # how long a server counts after its last sign of life
_NOW: ColumnClause[float] = literal_column("extract(epoch FROM clock_timestamp())::float8", Float)


@contextmanager
def serving_base(database: Database, digest: str, name: str, *, patience_s: float = LIFE_S) -> Iterator[None]:
    """While the block runs, this process counts as a server of that base.

    patience_s: how long a server of another base is waited for: one that was killed ends by itself. Raises Conflict
    (other_base_served).
    """
    server = uuid4().hex
    _enter(database, server, digest, name, patience_s)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(database, server, digest, name, stop), name="serving-base", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with suppress(StoreError), database.write(changes_answers=False) as connection:
            connection.execute(delete(servers).where(servers.c.id == server))


def _enter(database: Database, server: str, digest: str, name: str, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while True:
        with database.write() as connection:  # one after the other, so two bases do not both come first
            other = _other(connection, digest)
            if other is None:
                _write(connection, server, digest, name)
                return
        if time.monotonic() >= deadline_s:
            message = (
                f"base: another server serves {other} on this database, this one would serve {name}; stop the other, "
                f"or give this one a database and a data directory of its own"
            )
            raise Conflict("other_base_served", message, param="base")
        time.sleep(min(0.5, patience_s))


def _other(connection: Connection, digest: str) -> str | None:
    """The name of another base that a living server serves."""
    is_alive = servers.c.seen_s > _NOW - LIFE_S
    query = select(servers.c.base_name).where(servers.c.base_digest != digest, is_alive).limit(1)
    found = connection.execute(query).scalar()
    return None if found is None else str(found)


def _write(connection: Connection, server: str, digest: str, name: str) -> None:
    seen = connection.execute(update(servers).where(servers.c.id == server).values(seen_s=_NOW))
    if seen.rowcount == 0:
        values = {"id": server, "base_digest": digest, "base_name": name[:256], "seen_s": _NOW}
        connection.execute(delete(servers).where(servers.c.seen_s < _NOW - 10 * LIFE_S))
        connection.execute(insert(servers).values(values))


def _beat(database: Database, server: str, digest: str, name: str, stop: threading.Event) -> None:
    while not stop.wait(LIFE_S / 3):
        with suppress(StoreError), database.write(changes_answers=False) as connection:
            _write(connection, server, digest, name)

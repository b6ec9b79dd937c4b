"""Where this host keeps the bases that are served, by digest. So jobs can be created and run without a server.

Hosts may keep the same base at different paths. A base that this host has not served is looked for where another host
has it: they often share a file system, or an image.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from adapters_store.storage.database import Database, now_s
from adapters_store.storage.schema import served_bases
from server.jobs.served_base import ServedBase

_KEPT_S = 90 * 86_400  # a pod's host name never comes back


class ServedBases:
    """host: this machine's name."""

    def __init__(self, database: Database, host: str | None = None) -> None:
        self._database = database
        self._host = (host or platform.node() or "localhost")[:255]

    def remember(self, base: ServedBase) -> None:
        """Write it down as the one that this host served last."""
        own = (served_bases.c.digest == base.digest) & (served_bases.c.host == self._host)
        with self._database.write(changes_answers=False) as connection:
            last = connection.execute(select(func.coalesce(func.max(served_bases.c.served_at), 0))).scalar_one()
            moment = max(now_s(), int(last) + 1)  # strictly later than the others, also within one second
            connection.execute(delete(served_bases).where(own | (served_bases.c.served_at < moment - _KEPT_S)))
            connection.execute(insert(served_bases).values(host=self._host, served_at=moment, **_columns(base)))

    def last(self) -> ServedBase | None:
        """The base served last, by any host; None if none was."""
        with self._database.read() as connection:
            row = connection.execute(select(served_bases).order_by(served_bases.c.served_at.desc())).first()
            return None if row is None else self._by_digest(connection).get(row.digest)

    def find(self, digest: str) -> ServedBase | None:
        with self._database.read() as connection:
            return self._by_digest(connection).get(digest)

    def paths(self, connection: Connection) -> dict[str, Path]:
        """The folder of every known base, by digest."""
        return {digest: base.path for digest, base in self._by_digest(connection).items()}

    def _by_digest(self, connection: Connection) -> dict[str, ServedBase]:
        """This host's rows take precedence, then the latest."""
        rows = connection.execute(select(served_bases).order_by(served_bases.c.served_at)).all()
        return {row.digest: _base(row) for row in sorted(rows, key=lambda row: row.host == self._host)}


def _columns(base: ServedBase) -> dict[str, Any]:
    return {**asdict(base), "path": str(base.path.resolve())}


def _base(row: Row[Any]) -> ServedBase:
    values = {name: getattr(row, name) for name in ServedBase.__dataclass_fields__}
    return ServedBase(**{**values, "path": Path(row.path)})

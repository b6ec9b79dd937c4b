"""Proves that a data directory and a database belong together: one store id, kept in both. Removes nothing itself.

`store.json` in the directory and `store_state.store_id` in the database. What has no row is only rubbish where the rows
are the right ones; so every process proves the pair when it opens it, and again whenever it removes something.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from sqlalchemy import Connection, select, update

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.storage.filesystem import Filesystem
from adapters_store.storage.ownership import require_ownership
from adapters_store.storage.schema import store_state

FILE_NAME = "store.json"
CURE = (
    "set MULTILORA_DATABASE_URL or --database-url as this directory was used before; "
    "if the two do belong together: multilora adopt"
)


@dataclass(frozen=True, slots=True)
class Mark:
    """What store.json holds. is_joined: the database has the id too; False only while a process joins the two.

    adopted_at: Unix seconds; what lay in the directory before has no proven owner. 0 for a directory that was empty.
    """

    store_id: str
    is_joined: bool = True
    adopted_at: int = 0

    @classmethod
    def read(cls, root: Path) -> Mark | None:
        """Raises StoreError (wrong_store) for a file that is not of this form."""
        try:
            text = (root / FILE_NAME).read_bytes()
        except FileNotFoundError:
            return None
        try:
            mark = cls(**json.loads(text))
            return replace(mark, store_id=str(mark.store_id), adopted_at=int(mark.adopted_at))
        except (ValueError, TypeError):
            raise StoreError("wrong_store", f"{FILE_NAME} in the data directory is damaged; {CURE}") from None

    def write(self, root: Path) -> None:
        """Durable, and whole or not at all."""
        Filesystem().write_atomic(root / FILE_NAME, json.dumps(asdict(self)).encode())


def join(connection: Connection, root: Path) -> Mark:
    """The pair's mark, checked on both sides; a new pair gets one. The caller commits, then calls `settle`.

    Raises StoreError (wrong_store).
    """
    in_database = _locked_id(connection)
    mark = Mark.read(root)
    if mark is not None and not mark.is_joined and in_database != mark.store_id:
        mark = None  # a process was killed before the database had the id
    if mark is None and in_database is None:
        is_new = require_ownership(connection, root)
        return _begin(connection, root, Mark(uuid4().hex, is_joined=False, adopted_at=0 if is_new else _now_s()))
    if mark is None:
        raise StoreError("wrong_store", f"the database belongs to another data directory; {CURE}")
    if mark.store_id != in_database:
        raise StoreError("wrong_store", f"the data directory belongs to another database; {CURE}")
    return mark


def require_unmarked(root: Path) -> None:
    """Raises StoreError (wrong_store): there is no database yet, and the directory has one."""
    mark = Mark.read(root)
    if mark is not None and mark.is_joined:
        raise StoreError("wrong_store", f"the data directory belongs to another database; {CURE}")


def adopt(connection: Connection, root: Path) -> Mark:
    """Join the two whatever their ids are, as an operator asks. Files that exist now are never swept."""
    store_id = _locked_id(connection) or uuid4().hex
    return _begin(connection, root, Mark(store_id, is_joined=False, adopted_at=_now_s()))


def settle(mark: Mark, root: Path) -> Mark:
    """After the commit: the database has the id."""
    if not mark.is_joined:
        mark = replace(mark, is_joined=True)
        mark.write(root)
    return mark


def _begin(connection: Connection, root: Path, mark: Mark) -> Mark:
    mark.write(root)
    connection.execute(update(store_state).values(store_id=mark.store_id))
    return mark


def _locked_id(connection: Connection) -> str | None:
    found = connection.execute(select(store_state.c.store_id).with_for_update()).scalar_one()
    return None if found is None else str(found)


def _now_s() -> int:
    return int(time.time()) + 1  # file times have fractions: what is there now is older


class StorePair:
    """An open pair. Asked before every transaction whether the directory is still there. Safe from many threads.

    database_file: SQLite's; None for a server.
    """

    def __init__(self, root: Path, mark: Mark, database_file: Path | None) -> None:
        self._root = root
        self._mark = mark
        self._database_file = database_file
        self._opened = None if database_file is None else _identity(database_file)

    @property
    def store_id(self) -> str:
        return self._mark.store_id

    def require_folder(self) -> None:
        """Raises StoreUnavailable (data_dir_gone): removed, unmounted, or another's by now."""
        try:
            mark = Mark.read(self._root)
        except OSError:
            mark = None
        if mark is None or mark.store_id != self._mark.store_id:
            message = "the data directory is gone or was replaced while the server runs; nothing was stored"
            raise StoreUnavailable("data_dir_gone", message)
        if self._database_file is not None and _identity(self._database_file) != self._opened:
            message = "the database's file is gone or was replaced while the server runs; restart it"
            raise StoreUnavailable("data_dir_gone", message)

    def require(self, connection: Connection) -> None:
        """Raises StoreError (wrong_store) unless the database, too, is still the one."""
        if connection.execute(select(store_state.c.store_id)).scalar_one_or_none() != self._mark.store_id:
            raise StoreError("wrong_store", "the database is not the one that this data directory was opened with")

    def is_left_over(self, path: Path, grace_s: float) -> bool:
        """Whether it is older than the grace, and was made since the two were joined."""
        try:
            made_s = path.stat().st_mtime
        except FileNotFoundError:
            return False  # its owner was faster
        return time.time() - made_s > grace_s and made_s >= self._mark.adopted_at


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino

"""Proves that a data directory and a database belong together: one store id, kept in both. Removes nothing itself.

`store.json` in the directory, `store_state.store_id` in the database. A blob without a row may be removed only if the
rows are the right ones. So every process proves the pair when it opens it, and again whenever it removes something.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from sqlalchemy import Column, Connection, select, update

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.filesystem import Filesystem
from adapters_store.storage.schema import adapter_versions, few_at_a_time, files, jobs, store_state

FILE_NAME = "store.json"
_IN_BUCKET = "bucket-"  # how the id of a store begins whose blobs are in an object store
CURE = (
    "set MULTILORA_DATABASE_URL or --database-url as this directory was used before; "
    "if the two do belong together: multilora adopt"
)


class BucketMark(Protocol):
    """The object store's side of the proof: the object store.json."""

    def store_id(self) -> str | None: ...
    def claim(self, mark: Mark) -> None:
        """Make the bucket this store's, if it is no other's. Raises StoreError (wrong_store)."""

    def replace_id(self, mark: Mark) -> None:
        """Make the bucket this store's, also if it was another's."""

    def holds_blobs(self) -> bool: ...


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
        return cls.parse(text, "the data directory")

    @classmethod
    def parse(cls, text: bytes, where: str) -> Mark:
        """Raises StoreError (wrong_store)."""
        try:
            mark = cls(**json.loads(text))
            return replace(mark, store_id=str(mark.store_id), adopted_at=int(mark.adopted_at))
        except (ValueError, TypeError):
            raise StoreError("wrong_store", f"{FILE_NAME} in {where} is damaged; {CURE}") from None

    def write(self, root: Path) -> None:
        """Durable, and whole or not at all."""
        Filesystem().write_atomic(root / FILE_NAME, self.to_json())

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def is_cache(self) -> bool:
        """The blobs are in an object store, and what the directory holds of them is a copy."""
        return self.store_id.startswith(_IN_BUCKET)


def join(connection: Connection, root: Path) -> Mark:
    """The pair's mark, checked on both sides; a new pair gets one. The caller commits, then calls `settle`.

    Raises StoreError (wrong_store).
    """
    in_database = _locked_id(connection)
    mark = Mark.read(root)
    if mark is not None and not mark.is_joined and in_database != mark.store_id:
        mark = None  # a process was killed before the database had the id
    if (mark is not None and mark.is_cache) or (in_database or "").startswith(_IN_BUCKET):
        message = "the adapters are in an object store; set MULTILORA_BLOB_URL or --blob-url as before"
        raise StoreError("wrong_store", message)
    if mark is None and in_database is None:
        is_new = _require_ownership(connection, root)
        return _begin(connection, root, Mark(uuid4().hex, is_joined=False, adopted_at=0 if is_new else _now_s()))
    if mark is None:
        message = (
            "the database belongs to another data directory; give every server that directory, or one object store"
        )
        raise StoreError("wrong_store", f"{message} (--blob-url); {CURE}")
    if mark.store_id != in_database:
        raise StoreError("wrong_store", f"the data directory belongs to another database; {CURE}")
    return mark


def join_bucket(connection: Connection, root: Path, bucket: BucketMark) -> Mark:
    """The same for a directory that is a cache: database, object store and directory must have one id.

    The caller commits, then claims the bucket and calls `settle`. Raises StoreError (wrong_store).
    """
    in_database = _locked_id(connection)
    in_bucket, mark = bucket.store_id(), Mark.read(root)
    if in_bucket is not None and in_bucket != in_database:
        message = "the object store belongs to another database; set MULTILORA_DATABASE_URL and MULTILORA_BLOB_URL"
        raise StoreError("wrong_store", f"{message} as they were used before")
    if in_bucket is None and (bucket.holds_blobs() or _has_blob_rows(connection)):
        message = "the object store has no store.json, and it or the database has adapters or files already"
        raise StoreError("wrong_store", f"{message}; is it the right one? If so: multilora adopt")
    if (mark is None or not mark.is_cache) and _holds_blobs(root):
        message = "the data directory holds adapters or files itself; begin with an empty one beside an object store"
        raise StoreError("wrong_store", message)
    if mark is not None and mark.store_id != in_database:
        raise StoreError("wrong_store", f"the data directory belongs to another database; {CURE}")
    if in_database is None or not in_database.startswith(_IN_BUCKET):
        return _begin_bucket(connection)
    return Mark(in_database, is_joined=mark is not None)


def _begin_bucket(connection: Connection) -> Mark:
    mark = Mark(f"{_IN_BUCKET}{uuid4().hex}", is_joined=False)
    connection.execute(update(store_state).values(store_id=mark.store_id))
    return mark


def require_unmarked(root: Path) -> None:
    """Raises StoreError (wrong_store): there is no database yet, and the directory has one."""
    mark = Mark.read(root)
    if mark is not None and mark.is_joined:
        raise StoreError("wrong_store", f"the data directory belongs to another database; {CURE}")


def adopt(connection: Connection, root: Path, *, in_bucket: bool = False) -> Mark:
    """Join the two whatever their ids are, as an operator asks. Files that exist now are never swept.

    in_bucket: the blobs are in an object store, and the directory is a cache from now on. Raises StoreError
    (wrong_store): it holds blobs itself.
    """
    if in_bucket and _holds_blobs(root):
        message = "the data directory holds adapters or files itself; adopt the object store with an empty directory"
        raise StoreError("wrong_store", message)
    if in_bucket:
        return replace(_begin_bucket(connection), adopted_at=_now_s())
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


def _require_ownership(connection: Connection, root: Path) -> bool:
    """If the directory is empty. Raises StoreError (wrong_store) if one holds what the other does not know."""
    held = [
        (adapter_versions.c.digest, _digests(root / "blobs")),
        (files.c.digest, _digests(root / "files")),
        (jobs.c.id, [folder.name for folder in (root / "runs").glob("ftjob-*")]),
    ]
    if any(_knows_any(connection, column, names) for column, names in held):
        return False
    if any(names for _, names in held):
        message = "the data directory holds adapters, files or runs, and the database knows none of them"
        raise StoreError("wrong_store", f"{message}; is it the right database? If so: multilora adopt")
    if not _lies_in(connection, root) and any(_has_rows(connection, column) for column, _ in held):
        message = "the database has adapters, files or jobs, and the data directory holds none of them"
        raise StoreError("wrong_store", f"{message}; is it the right directory? If so: multilora adopt")
    return True


def _holds_blobs(root: Path) -> bool:
    """If the directory has adapters or files."""
    return any(_digests(root / folder) for folder in ("blobs", "files"))


def _has_blob_rows(connection: Connection) -> bool:
    """If the database has adapters or files."""
    return any(_has_rows(connection, column) for column in (adapter_versions.c.digest, files.c.digest))


def _lies_in(connection: Connection, root: Path) -> bool:
    """The database is SQLite's own file in the directory, so they belong together."""
    url = connection.engine.url
    return url.get_backend_name() == "sqlite" and Path(str(url.database)).resolve().parent == root.resolve()


def _digests(folder: Path) -> list[str]:
    return [f"sha256:{each.name}" for each in folder.glob("??/*")]


def _has_rows(connection: Connection, column: Column[str]) -> bool:
    return connection.execute(select(column).limit(1)).first() is not None


def _knows_any(connection: Connection, column: Column[str], names: Sequence[str]) -> bool:
    some = (select(column).where(column.in_(few)).limit(1) for few in few_at_a_time(names))
    return any(connection.execute(statement).first() is not None for statement in some)


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

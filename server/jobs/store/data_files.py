"""A tenant's uploaded data: bytes under their digest, and a row that names the owner. Knows no HTTP and no job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Row, delete, func, insert, select

from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.errors import BlobDamaged, Conflict, NotFound, StoreError
from adapters_store.filesystem import Filesystem
from adapters_store.parsing.strict_json import shown
from adapters_store.remote.keys import DATA
from adapters_store.remote.object_blobs import ObjectData
from adapters_store.remote.remote import Remote
from adapters_store.remote.sweep import sweep
from adapters_store.storage import audit
from adapters_store.storage.database import Database, now_s
from adapters_store.storage.locks import locks_for
from adapters_store.storage.schema import files
from server.jobs.limits import JobLimit, JobLimits, JobRefused
from server.jobs.store.batch_store import is_in_use
from server.jobs.store.data_blobs import DataBlobs
from server.jobs.store.job_rows import owned
from server.jobs.store.records import DataFile

PURPOSES = ("fine-tune", "batch")
OUTPUT_PURPOSE = "batch_output"  # of files that batches write; no upload has it
MAX_FILENAME_CHARS = 255


Digests = list[str]  # inside the class `list` is the method


class FileStore:
    """Uploads of every tenant. Safe from many threads and processes on one data directory."""

    def __init__(
        self,
        database: Database,
        data_dir: Path,
        limits: JobLimits,
        operations: Filesystem | None = None,
        *,
        remote: Remote | None = None,
    ):
        self._database = database
        self._remote = remote
        root, operations = data_dir / "files", operations or Filesystem()
        objects = None if remote is None else ObjectData(root, remote)
        self._blobs = DataBlobs(root, operations, locks_for(database.engine, root, "lock"), objects)
        self._limits = limits

    def add(self, *, tenant: str, filename: str, purpose: str, source: Path) -> DataFile:
        """Keep a copy of `source` for the tenant. Equal bytes are kept once, and count for every tenant that has them.

        Raises:
            JobRefused: unsupported_purpose, bad_filename, empty_file, too_large. JobLimit: too_many_bytes,
            too_many_files. NotFound: tenant_not_found. StoreError: disk_full.
        """
        self._check(filename, purpose, source.stat().st_size)
        staged, digest = self._blobs.stage(source)
        try:
            num_bytes, heals = staged.stat().st_size, self._blobs.is_damaged(digest)
            with self._blobs.changing(), self._kept(tenant, staged, digest) as connection:
                owner = tenant_id(connection, tenant, lock=True)
                self._check_limits(connection, owner, num_bytes)
                row = _insert(connection, owner, (digest, filename, purpose, num_bytes))
                audit.note(connection, "file.upload", tenant=tenant, target=row.id, digest=digest)
                self._blobs.put(staged, digest, heals=heals)  # inside the transaction: no row without its bytes
        finally:
            self._blobs.discard(staged)
        return DataFile(row.id, tenant, digest, filename, purpose, num_bytes, row.created_at)

    def add_output(self, *, tenant: str, file_id: str, filename: str, source: Path) -> None:
        """Keep a file that the server itself wrote for the tenant, once: a second call for the same id does nothing.
        The tenant's limits refuse its next upload, not this. Raises NotFound (tenant_not_found), StoreError."""
        staged, digest = self._blobs.stage(source)
        try:
            self._blobs.keep(staged, digest)
            num_bytes, heals = staged.stat().st_size, self._blobs.is_damaged(digest)
            with self._blobs.changing(), self._database.write() as connection:
                owner = tenant_id(connection, tenant, lock=True)
                if connection.execute(select(files.c.id).where(files.c.id == file_id)).first() is None:
                    _insert(connection, owner, (digest, filename, OUTPUT_PURPOSE, num_bytes), file_id)
                    self._blobs.put(staged, digest, heals=heals)
        finally:
            self._blobs.discard(staged)

    @contextmanager
    def _kept(self, tenant: str, staged: Path, digest: str) -> Iterator[Connection]:
        """A writing transaction, begun when an object store has the bytes: no transaction waits for the network."""
        if self._remote is not None:
            with self._database.read() as connection:
                self._check_limits(connection, tenant_id(connection, tenant), staged.stat().st_size)
            self._blobs.keep(staged, digest)
        with self._database.write() as connection:
            yield connection

    def get(self, tenant: str | None, file_id: str, *, param: str = "file_id") -> DataFile:
        """tenant None: any tenant's. Raises NotFound (file_not_found), the same for another tenant's file."""
        row = None
        if file_id.isprintable():  # no database is asked for half a character, and PostgreSQL for no NUL
            with self._database.read() as connection:
                row = connection.execute(owned(files, tenant).where(files.c.id == file_id)).first()
        if row is None:
            raise NotFound("file_not_found", f"{param}: no file {shown(file_id)}", param=param)
        return _to_file(row)

    def list(self, tenant: str | None, purpose: str | None = None) -> list[DataFile]:
        """The tenant's files (None: every tenant's), the newest first."""
        statement = owned(files, tenant).order_by(files.c.number.desc())
        if purpose is not None:
            statement = statement.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            return [_to_file(row) for row in connection.execute(statement)]

    def path(self, file: DataFile) -> Path:
        """The path of its bytes, which are read only."""
        return self._blobs.path(file.digest)

    def present_path(self, file: DataFile) -> Path:
        """The same, once they are compared with their digest. Raises BlobDamaged: blob_missing, blob_damaged."""
        with self._intact(file, "file_id"):
            return self._blobs.whole(file.digest)

    @contextmanager
    def _intact(self, file: DataFile, param: str) -> Iterator[None]:
        """Faults of the bytes name the file that a client knows, and the field that named it."""
        try:
            yield
        except FileNotFoundError:
            raise BlobDamaged("blob_missing", f"{file.id}: the file's bytes are missing", param=param) from None
        except StoreError as error:
            if error.code != "blob_damaged":
                raise
            message = f"{file.id}: {error.message}; upload it again"
            raise BlobDamaged("blob_damaged", message, param=param) from error

    def delete(self, tenant: str | None, file_id: str) -> None:
        """Delete a file; running jobs keep their copy. Raises NotFound (file_not_found), Conflict (file_in_use)."""
        file = self.get(tenant, file_id)
        with self._blobs.changing():
            with self._database.write() as connection:
                if is_in_use(connection, file_id):
                    raise Conflict("file_in_use", f"{file_id} is read by a batch; cancel the batch first")
                connection.execute(delete(files).where(files.c.id == file_id))
                audit.note(connection, "file.delete", tenant=file.tenant, target=file_id)
            self._drop_unreferenced([file.digest])

    def link(self, file: DataFile, target: Path, *, param: str = "file_id") -> None:
        """Give a job its own link to the bytes. param: the request's field that named the file. Raises NotFound
        (file_not_found) if it was deleted meanwhile, BlobDamaged (blob_missing, blob_damaged)."""
        with self._intact(file, param):
            try:
                self._blobs.whole(file.digest)
                with self._blobs.changing():
                    self._blobs.link(file.digest, target)
            except FileNotFoundError:
                self.get(file.tenant, file.id, param=param)
                raise

    def sweep(self, grace_s: float = 3600) -> int:
        """Remove blobs without a row, and the remains of killed uploads; returns the number.

        Raises StoreError (wrong_store) if the rows are not proved to be this directory's.
        """
        pair = self._database.pair
        with self._blobs.changing():
            made_here = [each for each in self._blobs.list() if pair.is_left_over(self._blobs.path(each), -1)]
            removed = self._drop_unreferenced(made_here)
        return removed + self._blobs.remove_old_staging(lambda staged: pair.is_left_over(staged, grace_s))

    def sweep_remote(self, grace_s: float | None = None) -> int:
        """Remove from the object store, if there is one, what no row has named for the grace (None: the settings').

        Raises StoreUnavailable (blobs_unavailable), StoreError (wrong_store).
        """
        if self._remote is None:
            return 0
        found = sweep(
            self._remote, DATA, self._referenced, self._remote.settings.grace_s if grace_s is None else grace_s
        )
        return 0 if found is None else len(found.removed)

    def _referenced(self) -> set[str]:
        with self._database.proven() as connection:
            return set(connection.scalars(select(files.c.digest)))

    def _drop_unreferenced(self, digests: Digests) -> int:
        kept = self._referenced()
        orphans = [digest for digest in digests if digest not in kept]
        for digest in orphans:
            self._blobs.remove(digest)
        return len(orphans)

    def _check(self, filename: str, purpose: str, num_bytes: int) -> None:
        if purpose not in PURPOSES:
            raise JobRefused(
                "unsupported_purpose", f"purpose: must be one of {PURPOSES}, got {shown(purpose)}", param="purpose"
            )
        if not 0 < len(filename) <= MAX_FILENAME_CHARS or not filename.isprintable():
            message = f"file: the name must have 1 to {MAX_FILENAME_CHARS} printable characters, got {shown(filename)}"
            raise JobRefused("bad_filename", message, param="file")
        if num_bytes == 0:
            raise JobRefused("empty_file", "file: must have at least 1 byte, got 0", param="file")
        if num_bytes > self._limits.max_file_bytes:
            message = f"file: must have at most {self._limits.max_file_bytes} bytes, got {num_bytes}"
            raise JobRefused("too_large", message, param="file")

    def _check_limits(self, connection: Connection, owner: int, num_bytes: int) -> None:
        totals = select(func.count(), func.coalesce(func.sum(files.c.num_bytes), 0)).where(files.c.tenant_id == owner)
        count, kept = connection.execute(totals).one()
        limits = self._limits
        if count >= limits.max_tenant_files:
            message = f"file: the tenant has {count} files, the limit is {limits.max_tenant_files}; delete some first"
            raise JobLimit("too_many_files", message, param="file")
        if kept + num_bytes > limits.max_tenant_bytes:
            message = (
                f"file: {num_bytes} bytes with the tenant's {kept} would pass its limit of {limits.max_tenant_bytes}; "
                "delete files first"
            )
            raise JobLimit("too_many_bytes", message, param="file")


def _insert(
    connection: Connection, owner: int, what: tuple[str, str, str, int], file_id: str | None = None
) -> Row[tuple[str, int]]:
    digest, filename, purpose, num_bytes = what
    values = {
        "id": file_id or f"file-{uuid4().hex[:24]}",
        "tenant_id": owner,
        "digest": digest,
        "filename": filename,
        "purpose": purpose,
        "num_bytes": num_bytes,
        "created_at": now_s(),
    }
    return connection.execute(insert(files).values(values).returning(files.c.id, files.c.created_at)).one()


def _to_file(row: Row[Any]) -> DataFile:
    return DataFile(row.id, row.tenant, row.digest, row.filename, row.purpose, row.num_bytes, row.created_at)

"""Batches: many requests of one file, answered when the server has room. Rows only; knows no HTTP and no engine.

Each answered line is a row until its batch ends. The row's key is the line's number, so however often servers are
killed, a line is kept once. A batch ends in one transaction, which names its files and removes these rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.errors import Conflict, NotFound
from adapters_store.parsing.strict_json import shown
from adapters_store.storage import audit
from adapters_store.storage.database import Database, now_s
from adapters_store.storage.schema import batch_lines, batches
from server.jobs.limits import BatchLimits, JobLimit
from server.jobs.store.job_rows import insert_once, owned

WINDOW_S = 24 * 3600
_AT_ONCE = 500  # answered lines read at once


class BatchStatus(StrEnum):
    """OpenAI's; files are checked before a batch is made, so none is `validating`."""

    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self not in UNFINISHED


UNFINISHED = frozenset({BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING})
_UNFINISHED = [status.value for status in UNFINISHED]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a batch is created with."""

    tenant: str
    base_digest: str
    endpoint: str
    input_file_id: str
    num_lines: int
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A row of `batches`. Times are Unix seconds."""

    number: int
    id: str
    tenant: str
    status: BatchStatus
    base_digest: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    metadata: Mapping[str, str] | None
    num_lines: int
    num_completed: int
    num_failed: int
    created_at: int
    expires_at: int
    cancelling_at: int | None
    finalizing_at: int | None
    ended_at: int | None
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """number: its place in the input file, from 0. status: of the HTTP answer. answer: the line of the output or the
    error file."""

    number: int
    status: int
    answer: str

    @property
    def is_good(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnd:
    """How a batch ends. status: one that has ended. error: why it failed, as code and message."""

    status: BatchStatus
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    error: tuple[str, str] | None = None


Batches = list[Batch]  # inside the class `list` is the method


class BatchStore:
    """Safe from many threads and processes."""

    def __init__(self, database: Database, limits: BatchLimits) -> None:
        self._database = database
        self._limits = limits

    def add(self, new: NewBatch) -> Batch:
        """Raises JobLimit (too_many_batches), NotFound (tenant_not_found)."""
        values = {
            "id": f"batch_{uuid4().hex[:24]}",
            "status": BatchStatus.IN_PROGRESS.value,
            "base_digest": new.base_digest,
            "endpoint": new.endpoint,
            "input_file_id": new.input_file_id,
            "metadata": None if new.metadata is None else json.dumps(dict(new.metadata)),
            "num_lines": new.num_lines,
            "num_completed": 0,
            "num_failed": 0,
            "created_at": now_s(),
            "expires_at": now_s() + WINDOW_S,
        }
        with self._database.write(changes_answers=False) as connection:
            owner = tenant_id(connection, new.tenant, lock=True)
            self._check_limit(connection, owner)
            connection.execute(insert(batches).values(tenant_id=owner, **values))
            audit.note(connection, "batch.create", tenant=new.tenant, target=str(values["id"]))
            found = _found(connection, str(values["id"]))
        assert found is not None
        return found

    def _check_limit(self, connection: Connection, owner: int) -> None:
        own = select(func.count()).select_from(batches).where(batches.c.tenant_id == owner)
        active = connection.execute(own.where(batches.c.status.in_(_UNFINISHED))).scalar_one()
        limit = self._limits.max_active
        if active >= limit:
            message = f"the tenant has {active} batches that have not ended, the limit is {limit}"
            raise JobLimit("too_many_batches", message, retry_after_s=60)

    def get(self, tenant: str | None, batch_id: str) -> Batch:
        """With its counts so far. tenant None: any tenant's. Raises NotFound (batch_not_found)."""
        with self._database.read() as connection:
            batch = _found(connection, batch_id, tenant)
            counted = None if batch is None else _counted(connection, [batch])
        if not counted:
            raise NotFound("batch_not_found", f"no batch {shown(batch_id)}", param="batch_id")
        return counted[0]

    def list(self, tenant: str | None) -> Batches:
        """The tenant's batches (None: every tenant's), the newest first, with their counts so far."""
        statement = owned(batches, tenant).order_by(batches.c.number.desc())
        with self._database.read() as connection:
            return _counted(connection, [_to_batch(row) for row in connection.execute(statement)])

    def unfinished(self, base_digest: str) -> Batches:
        """Every tenant's batches for this base that have not ended, the oldest first."""
        mine = owned(batches, None).where(batches.c.base_digest == base_digest, batches.c.status.in_(_UNFINISHED))
        with self._database.read() as connection:
            return [_to_batch(row) for row in connection.execute(mine.order_by(batches.c.number))]

    def cancel(self, tenant: str | None, batch_id: str) -> Batch:
        """Ask for the end of a batch; what is answered by then is kept. A second call changes nothing.

        Raises NotFound (batch_not_found), Conflict (batch_ended).
        """
        with self._database.write(changes_answers=False) as connection:
            batch = _found(connection, batch_id, tenant)
            if batch is not None and batch.status is BatchStatus.IN_PROGRESS:
                values = {"status": BatchStatus.CANCELLING.value, "cancelling_at": now_s()}
                _change(connection, batch, values, only_in=BatchStatus.IN_PROGRESS)
                audit.note(connection, "batch.cancel", tenant=batch.tenant, target=batch_id)
        if batch is not None and batch.status in {BatchStatus.FINALIZING, BatchStatus.COMPLETED, BatchStatus.FAILED}:
            raise Conflict("batch_ended", f"batch {batch_id} is {batch.status.value}", param="batch_id")
        return self.get(tenant, batch_id)

    def answered(self, batch: Batch) -> set[int]:
        """The numbers of the lines that are kept."""
        with self._database.read() as connection:
            numbers = select(batch_lines.c.number).where(batch_lines.c.batch_number == batch.number)
            return set(connection.scalars(numbers))

    def keep(self, batch: Batch, lines: Sequence[AnsweredLine]) -> None:
        """Keep answers. A line that is kept already stays as it is; nothing is kept of a batch that has ended."""
        with self._database.write(changes_answers=False) as connection:
            status = select(batches.c.status).where(batches.c.number == batch.number).with_for_update()
            if connection.execute(status).scalar() not in _UNFINISHED:
                return
            for line in lines:
                values = {"number": line.number, "status": line.status, "answer": line.answer}
                insert_once(connection, batch_lines, {"batch_number": batch.number, **values})

    def lines(self, batch: Batch) -> Iterator[AnsweredLine]:
        """The kept lines in the order of the input file."""
        last = -1
        while True:
            own = select(batch_lines).where(batch_lines.c.batch_number == batch.number, batch_lines.c.number > last)
            with self._database.read() as connection:
                rows = connection.execute(own.order_by(batch_lines.c.number).limit(_AT_ONCE)).all()
            yield from (AnsweredLine(row.number, row.status, row.answer) for row in rows)
            if len(rows) < _AT_ONCE:
                return
            last = rows[-1].number

    def begin_finalizing(self, batch: Batch) -> None:
        """All its lines are answered; from now on it cannot be cancelled."""
        with self._database.write(changes_answers=False) as connection:
            values = {"status": BatchStatus.FINALIZING.value, "finalizing_at": now_s()}
            _change(connection, batch, values, only_in=BatchStatus.IN_PROGRESS)

    def end(self, batch: Batch, end: BatchEnd) -> None:
        """In one transaction: name the files, and drop the kept lines. A batch that has ended stays as it is."""
        code, message = end.error or (None, None)
        values = {
            "status": end.status.value,
            "num_completed": end.num_completed,
            "num_failed": end.num_failed,
            "output_file_id": end.output_file_id,
            "error_file_id": end.error_file_id,
            "ended_at": now_s(),
            "error_code": code,
            "error_message": message,
        }
        with self._database.write(changes_answers=False) as connection:
            _change(connection, batch, values)
            connection.execute(delete(batch_lines).where(batch_lines.c.batch_number == batch.number))


def is_in_use(connection: Connection, file_id: str) -> bool:
    """Whether an unfinished batch reads this file."""
    using = select(batches.c.number).where(batches.c.input_file_id == file_id, batches.c.status.in_(_UNFINISHED))
    return connection.execute(using.limit(1)).first() is not None


def _change(
    connection: Connection, batch: Batch, values: Mapping[str, Any], *, only_in: BatchStatus | None = None
) -> None:
    """If it has not ended."""
    statuses = _UNFINISHED if only_in is None else [only_in.value]
    where = (batches.c.number == batch.number, batches.c.status.in_(statuses))
    connection.execute(update(batches).where(*where).values(**values))


def _counted(connection: Connection, found: Sequence[Batch]) -> Batches:
    """With the counts so far of those that have not ended."""
    numbers = [batch.number for batch in found if not batch.status.has_ended]
    if not numbers:
        return [*found]
    is_good = batch_lines.c.status == 200
    counts = select(batch_lines.c.batch_number, is_good.label("is_good"), func.count().label("num_lines"))
    counts = counts.where(batch_lines.c.batch_number.in_(numbers)).group_by(batch_lines.c.batch_number, is_good)
    known = {(row.batch_number, bool(row.is_good)): int(row.num_lines) for row in connection.execute(counts)}
    return [
        batch
        if batch.status.has_ended
        else replace(
            batch,
            num_completed=known.get((batch.number, True), 0),
            num_failed=known.get((batch.number, False), 0),
        )
        for batch in found
    ]


def _found(connection: Connection, batch_id: str, tenant: str | None = None) -> Batch | None:
    row = connection.execute(owned(batches, tenant).where(batches.c.id == batch_id)).first()
    return None if row is None else _to_batch(row)


def _to_batch(row: Row[Any]) -> Batch:
    values = {name: getattr(row, name) for name in Batch.__dataclass_fields__}
    metadata = None if row.metadata is None else json.loads(row.metadata)
    return Batch(**{**values, "status": BatchStatus(row.status), "metadata": metadata})

"""The rows of jobs: inserted, read, moved from one status to the next. Decides no policy.

Every function works inside the caller's transaction. A status is only ever changed from the status it was seen in, so
two processes that want different things never overwrite each other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from adapters_store.storage.database import now_s
from adapters_store.storage.schema import job_checkpoints, job_events, jobs, tenants
from server.jobs.store.records import Job, JobCheckpoint, JobEvent, JobFailure, JobStatus, Level

_JSON = ("request", "spec", "progress", "override")


def insert_job(connection: Connection, owner: int, values: Mapping[str, Any]) -> None:
    """values: columns by name, JSON ones as objects; omitted ones begin empty."""
    defaults = {"run_number": 1, "wanted": "run", "progress": {}, "created_at": now_s()}
    connection.execute(insert(jobs).values(tenant_id=owner, **_encoded({**defaults, **values})))


def find_job(connection: Connection, job_id: str, tenant: str | None = None) -> Job | None:
    """tenant None: any tenant's."""
    row = connection.execute(owned(jobs, tenant).where(jobs.c.id == job_id)).first()
    return None if row is None else _to_job(row)


def list_jobs(
    connection: Connection, tenant: str | None = None, statuses: Collection[JobStatus] | None = None
) -> list[Job]:
    """The newest first."""
    statement = owned(jobs, tenant).order_by(jobs.c.number.desc())
    if statuses is not None:
        statement = statement.where(jobs.c.status.in_([status.value for status in statuses]))
    return [_to_job(row) for row in connection.execute(statement)]


def count_jobs(
    connection: Connection, owner: int, *, statuses: Collection[JobStatus] | None = None, since_s: int = 0
) -> int:
    """The tenant's jobs in one of the statuses (None: any), created since since_s."""
    statement = select(func.count()).select_from(jobs).where(jobs.c.tenant_id == owner, jobs.c.created_at >= since_s)
    if statuses is not None:
        statement = statement.where(jobs.c.status.in_([status.value for status in statuses]))
    return int(connection.execute(statement).scalar_one())


def last_starts(connection: Connection) -> dict[str, int]:
    """When each tenant's latest training began, Unix seconds."""
    statement = (
        select(tenants.c.name, func.max(jobs.c.started_at)).select_from(jobs.join(tenants)).group_by(tenants.c.name)
    )
    return {name: at for name, at in connection.execute(statement) if at is not None}


def change(
    connection: Connection,
    job_id: str,
    values: Mapping[str, Any],
    only_in: Collection[JobStatus] = (),
    *,
    wanted: Collection[str] = (),
) -> bool:
    """Write the columns, if the job's status is one of those, and what is wanted of it one of these (none given: any).

    Returns whether it was.
    """
    statement = update(jobs).where(jobs.c.id == job_id)
    if only_in:
        statement = statement.where(jobs.c.status.in_([status.value for status in only_in]))
    if wanted:
        statement = statement.where(jobs.c.wanted.in_(wanted))
    return connection.execute(statement.values(_encoded(values))).rowcount > 0


def add_event(
    connection: Connection,
    job: Job,
    key: str,
    message: str,
    *,
    level: Level = "info",
    kind: str = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Once per key: repeated after a crash it changes nothing."""
    values = {
        "job_number": job.number,
        "key": key,
        "created_at": now_s(),
        "level": level,
        "type": kind,
        "message": message,
        "data": json.dumps(data or {}),
    }
    insert_once(connection, job_events, values)


def add_checkpoint(connection: Connection, job: Job, step: int, metrics: Mapping[str, Any]) -> None:
    """Once per step."""
    values = {"job_number": job.number, "step": step, "metrics": json.dumps(metrics), "created_at": now_s()}
    insert_once(connection, job_checkpoints, values)


def list_events(connection: Connection, job: Job) -> list[JobEvent]:
    """The newest first."""
    condition = job_events.c.job_number == job.number
    rows = connection.execute(select(job_events).where(condition).order_by(job_events.c.number.desc()))
    return [_to_event(row) for row in rows]


def find_event(connection: Connection, job: Job, key: str) -> JobEvent | None:
    condition = (job_events.c.job_number == job.number) & (job_events.c.key == key)
    row = connection.execute(select(job_events).where(condition)).first()
    return None if row is None else _to_event(row)


def _to_event(row: Row[Any]) -> JobEvent:
    return JobEvent(row.number, row.created_at, row.level, row.type, row.message, json.loads(row.data))


def list_checkpoints(connection: Connection, job: Job) -> list[JobCheckpoint]:
    """The newest first."""
    condition = job_checkpoints.c.job_number == job.number
    rows = connection.execute(select(job_checkpoints).where(condition).order_by(job_checkpoints.c.step.desc()))
    return [JobCheckpoint(row.number, row.step, json.loads(row.metrics), row.created_at) for row in rows]


def insert_once(connection: Connection, table: Any, values: Mapping[str, Any]) -> None:
    """Changes nothing if there is a row of the same key."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(make(table).values(values).on_conflict_do_nothing())


def _encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: json.dumps(value) if key in _JSON and value is not None else getattr(value, "value", value)
        for key, value in values.items()
    }


def owned(table: Table, tenant: str | None) -> Select[Any]:
    """The tenant's rows of a table (None: every tenant's), with the tenant's name."""
    statement = select(table, tenants.c.name.label("tenant")).select_from(table.join(tenants))
    return statement if tenant is None else statement.where(tenants.c.name == tenant)


def _to_job(row: Row[Any]) -> Job:
    values = {name: getattr(row, name) for name in Job.__dataclass_fields__ if name != "failure"}
    values |= {name: json.loads(values[name]) for name in _JSON if values[name] is not None}
    failure = None
    if row.error_code is not None:
        failure = JobFailure(row.error_code, row.error_message or "", row.error_param)
    return Job(**{**values, "status": JobStatus(row.status), "run_dir": Path(row.run_dir), "failure": failure})

"""The rows behind a bare name: the active version, the canaries beside it, and what was active before. Knows no names.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, ScalarSelect, delete, func, insert, select, update

from adapters_store.storage.schema import adapter_versions, adapters, alias_history, alias_weights

MAX_HISTORY = 32


def percent_of_version() -> ScalarSelect[int]:
    """For a select over adapter_versions: the percent of a canary; NULL if the version is none."""
    same = (alias_weights.c.adapter_id == adapter_versions.c.adapter_id) & (
        alias_weights.c.number == adapter_versions.c.number
    )
    return select(alias_weights.c.percent).where(same).correlate(adapter_versions).scalar_subquery()


def percent_of_canaries() -> ScalarSelect[int]:
    """For a select over adapters: what all canaries of the name have together."""
    total = select(func.coalesce(func.sum(alias_weights.c.percent), 0))
    return total.where(alias_weights.c.adapter_id == adapters.c.id).correlate(adapters).scalar_subquery()


def active_number(connection: Connection, adapter_id: int) -> int | None:
    return connection.execute(select(adapters.c.active_number).where(adapters.c.id == adapter_id)).scalar()


def canaries(connection: Connection, adapter_id: int) -> dict[int, int]:
    """Percent by version number."""
    rows = connection.execute(
        select(alias_weights.c.number, alias_weights.c.percent)
        .where(alias_weights.c.adapter_id == adapter_id)
        .order_by(alias_weights.c.number)
    )
    return {row.number: row.percent for row in rows}


def set_active(connection: Connection, adapter_id: int, number: int) -> None:
    """The bare name means this version alone, which is in service from now on."""
    before = active_number(connection, adapter_id)
    if before is not None and before != number:
        connection.execute(insert(alias_history).values(adapter_id=adapter_id, number=before))
        _forget_oldest(connection, adapter_id)
    _point_at(connection, adapter_id, number)


def go_back(connection: Connection, adapter_id: int) -> int | None:
    """Activate what was active before, if it still exists in service; its number, or None and nothing is changed."""
    usable = select(adapter_versions.c.number).where(
        adapter_versions.c.adapter_id == adapter_id, adapter_versions.c.unloaded.is_(False)
    )
    condition = (alias_history.c.adapter_id == adapter_id) & alias_history.c.number.in_(usable)
    now = active_number(connection, adapter_id)
    if now is not None:
        condition &= alias_history.c.number != now
    last = connection.execute(
        select(alias_history.c.id, alias_history.c.number).where(condition).order_by(alias_history.c.id.desc()).limit(1)
    ).first()
    if last is None:
        return None
    newer = (alias_history.c.adapter_id == adapter_id) & (alias_history.c.id >= last.id)
    connection.execute(delete(alias_history).where(newer))
    _point_at(connection, adapter_id, last.number)
    return int(last.number)


def set_canary(connection: Connection, adapter_id: int, number: int, percent: int) -> None:
    """percent 0 ends it."""
    drop_canaries(connection, adapter_id, [number])
    if percent:
        values = {"adapter_id": adapter_id, "number": number, "percent": percent}
        connection.execute(insert(alias_weights).values(values))


def drop_canaries(connection: Connection, adapter_id: int, numbers: Collection[int] | None = None) -> int:
    """Those of `numbers`, or all; how many there were."""
    condition = alias_weights.c.adapter_id == adapter_id
    if numbers is not None:
        condition &= alias_weights.c.number.in_(numbers)
    return connection.execute(delete(alias_weights).where(condition)).rowcount


def withdraw(connection: Connection, adapter_id: int, numbers: Collection[int], *, is_gone: bool) -> None:
    """These versions leave service. Without its active version a bare name means nothing, whatever canaries it had.

    is_gone: they are deleted, not only unloaded.
    """
    takes_active = active_number(connection, adapter_id) in numbers
    drop_canaries(connection, adapter_id, None if takes_active else numbers)
    if not is_gone:
        _set_unloaded(connection, adapter_id, numbers, True)
        return
    gone = (alias_history.c.adapter_id == adapter_id) & alias_history.c.number.in_(numbers)
    connection.execute(delete(alias_history).where(gone))
    if takes_active:
        connection.execute(update(adapters).where(adapters.c.id == adapter_id).values(active_number=None))


def _point_at(connection: Connection, adapter_id: int, number: int) -> None:
    drop_canaries(connection, adapter_id)
    _set_unloaded(connection, adapter_id, [number], False)
    connection.execute(update(adapters).where(adapters.c.id == adapter_id).values(active_number=number))


def _set_unloaded(connection: Connection, adapter_id: int, numbers: Collection[int], unloaded: bool) -> None:
    condition = (adapter_versions.c.adapter_id == adapter_id) & adapter_versions.c.number.in_(numbers)
    connection.execute(update(adapter_versions).where(condition).values(unloaded=unloaded))


def _forget_oldest(connection: Connection, adapter_id: int) -> None:
    own = alias_history.c.adapter_id == adapter_id
    kept = select(alias_history.c.id).where(own).order_by(alias_history.c.id.desc()).limit(MAX_HISTORY)
    connection.execute(delete(alias_history).where(own, alias_history.c.id.not_in(kept.scalar_subquery())))

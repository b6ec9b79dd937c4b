"""New SQLite stores of the tests get the tables that the migrations made once in this process, statement by statement.

The migrations take 0.1 s of CPU and more than a thousand tests make a store. An old store is migrated as everywhere.
"""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, inspect

from adapters_store.storage import database

Statement = tuple[str, tuple[object, ...]]


def quicken_migrations(patch: pytest.MonkeyPatch) -> None:
    migrate, made = database._migrate, list[Statement]()

    def quick(connection: Connection) -> None:
        if connection.dialect.name != "sqlite" or inspect(connection).get_table_names():
            migrate(connection)
        elif made:
            for sql, values in made:
                connection.exec_driver_sql(sql, values)
        else:
            migrate(connection)
            made.extend(_statements(connection))

    patch.setattr(database, "_migrate", quick)


def _statements(connection: Connection) -> list[Statement]:
    """What makes this database: its tables with their rows, its indexes and triggers, in the order they were made."""
    query = (
        "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
    )
    found: list[Statement] = []
    for kind, name, sql in connection.exec_driver_sql(query).all():
        found.append((sql, ()))
        rows = connection.exec_driver_sql(f'SELECT * FROM "{name}"').all() if kind == "table" else []
        found += [(f'INSERT INTO "{name}" VALUES ({",".join("?" * len(row))})', tuple(row)) for row in rows]
    return found

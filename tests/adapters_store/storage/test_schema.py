"""The migrations make exactly the tables the code uses."""

from __future__ import annotations

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from adapters_store.storage import database
from adapters_store.storage.schema import HEAD_REVISION, metadata
from adapters_store.store import AdapterStore


def test_migrations_and_tables_agree(store: AdapterStore) -> None:
    with store._database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_head_revision_is_the_newest_script() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD_REVISION]


def test_sqlite_is_durable_and_keeps_references(store: AdapterStore) -> None:
    with store._database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 10_000}


def test_a_failed_migration_leaves_no_table(data_dir: Path) -> None:
    data_dir.mkdir()
    engine = database.make_engine(f"sqlite:///{data_dir / 'x.db'}")
    with engine.connect().execution_options(multilora_write=True) as connection:
        transaction = connection.begin()
        connection.exec_driver_sql("CREATE TABLE t (x INTEGER)")
        transaction.rollback()
    assert inspect(engine).get_table_names() == []
    engine.dispose()

"""The migrations make exactly the tables the code uses."""

from __future__ import annotations

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, select

from adapters_store.base.description import BaseDescription
from adapters_store.storage import database
from adapters_store.storage.schema import HEAD_REVISION, adapter_versions, metadata
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, write


def test_migrations_and_tables_agree(store: AdapterStore) -> None:
    with store.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_head_revision_is_the_newest_script() -> None:
    assert ScriptDirectory.from_config(database.migrations()).get_heads() == [HEAD_REVISION]


def test_versions_stored_before_revision_0013_show_their_type(
    store: AdapterStore, base: BaseDescription, data_dir: Path, tmp_path: Path
) -> None:
    weights = write(tmp_path / "upload.safetensors", safetensors_bytes(lora_tensors(base)))
    for dtype in (None, "int8"):
        store.publish(
            tenant="acme",
            name="law",
            config=config_bytes(),
            weights=weights,
            base=base,
            adapter_dtype=dtype,
            int8_change=lambda *_: 0.0,
        )
    with store.database.write() as connection:
        [row] = connection.execute(select(adapter_versions).where(adapter_versions.c.number == 2)).mappings()
        more = [{**row, "id": n, "number": n, "digest": f"sha256:{n:064x}"} for n in range(3, 1100)]
        connection.execute(insert(adapter_versions), more)
        connection.exec_driver_sql("ALTER TABLE adapter_versions DROP COLUMN adapter_dtype")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0012'")
    reopened = AdapterStore.open(data_dir)
    shown = [version.adapter_dtype for version in reopened.versions("acme", "law")]
    reopened.close()
    assert shown == [None] + ["int8"] * 1098


def test_sqlite_is_durable_and_keeps_references(store: AdapterStore) -> None:
    with store.database.read() as connection:
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

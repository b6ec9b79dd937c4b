"""Takes a store back to what it was before it had an id: tables of revision 0006, no store.json."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import text

from adapters_store.storage.database import make_engine


def make_old(data_dir: Path, url: str | None = None) -> None:
    engine = make_engine(url or f"sqlite:///{data_dir / 'multilora.db'}")
    with engine.connect().execution_options(multilora_write=True) as connection, connection.begin():
        for table in ("tenant_meters", "servers", "served_bases", "batch_lines", "batches"):
            connection.execute(text(f"DROP TABLE {table}"))
        for column in ("tool_dialect", "chat_template", "invocation_tokens", "adapter_dtype"):
            connection.execute(text(f"ALTER TABLE adapter_versions DROP COLUMN {column}"))
        connection.execute(text("ALTER TABLE jobs DROP COLUMN executor"))
        connection.execute(text("ALTER TABLE store_state DROP COLUMN store_id"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0006'"))
    engine.dispose()
    (data_dir / "store.json").unlink()

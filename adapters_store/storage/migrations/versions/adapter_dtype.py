"""The type an adapter is kept in, if not the base's.

It is in the version's config, which its digest covers; the column shows it without reading it.
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_AT_ONCE = 500  # a config may hold a chat template of 64 KiB


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("adapter_dtype", sa.String(32)))
    columns = sa.column("id", sa.Integer), sa.column("config", sa.LargeBinary), sa.column("adapter_dtype", sa.String)
    versions = sa.table("adapter_versions", *columns)
    connection, last = op.get_bind(), 0
    stored = sa.select(versions.c.id, versions.c.config).order_by(versions.c.id).limit(_AT_ONCE)
    while rows := connection.execute(stored.where(versions.c.id > last)).all():
        last = rows[-1].id
        for row in rows:
            dtype = json.loads(row.config).get("multilora_adapter_dtype")
            if dtype is not None:
                change = versions.update().where(versions.c.id == row.id)
                connection.execute(change.values(adapter_dtype=dtype))

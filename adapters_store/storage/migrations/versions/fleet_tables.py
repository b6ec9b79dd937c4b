"""What servers on one PostgreSQL count together of a tenant's quotas, and which base each serves.

The meters are unlogged there: after its crash quotas are full.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenant_meters",
        sa.Column(
            "tenant_id",
            sa.Integer,
            sa.ForeignKey("tenants.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("requests_capacity", sa.Float),
        sa.Column("requests_level", sa.Float),
        sa.Column("tokens_capacity", sa.Float),
        sa.Column("tokens_level", sa.Float),
        sa.Column("updated_s", sa.Float, nullable=False),
        sa.Column("running", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
        sa.Column("is_taken", sa.Boolean, nullable=False),
        prefixes=["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else [],
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("base_digest", sa.String(128), nullable=False),
        sa.Column("base_name", sa.String(256), nullable=False),
        sa.Column("seen_s", sa.Float, nullable=False),
    )

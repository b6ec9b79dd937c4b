"""Which executor runs a job, where each host keeps its bases, and run folders as paths within the data directory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("executor", sa.String(32)))
    op.execute("UPDATE jobs SET run_dir = 'runs/' || id")
    op.create_table(
        "served_bases",
        sa.Column("digest", sa.String(128), primary_key=True),
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("dtype", sa.String(32), nullable=False),
        sa.Column("quantize", sa.String(32)),
        sa.Column("device", sa.String(32), nullable=False),
        sa.Column("served_at", sa.BigInteger, nullable=False),
    )

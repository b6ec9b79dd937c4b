"""Which data directory the rows belong to. The first process that opens the pair gives it its id."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("store_state", sa.Column("store_id", sa.String(64)))

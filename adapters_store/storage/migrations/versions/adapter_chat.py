"""How an adapter version's chats are written: its tool dialect, and the digest of its chat template.

Both are in the version's config, which its digest covers; the columns show them without reading it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("tool_dialect", sa.String(32)))
    op.add_column("adapter_versions", sa.Column("chat_template", sa.String(71)))

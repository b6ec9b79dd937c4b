"""The tokens that switch an activated LoRA on: a request for it looks for them in its prompt.

They are in the version's config, which its digest covers; the column shows them without reading it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("invocation_tokens", sa.Text))

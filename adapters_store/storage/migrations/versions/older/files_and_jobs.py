"""Files, onboarding jobs, their events and checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _make_files()
    _make_jobs()
    _make_what_jobs_tell()


def _make_files() -> None:
    op.create_table(
        "files",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant_id", sa.Integer, sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("digest", sa.String(71), nullable=False, index=True),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )


def _make_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant_id", sa.Integer, sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("status", sa.String(32), nullable=False, index=True),
        sa.Column("wanted", sa.String(16), nullable=False),
        sa.Column("run_number", sa.Integer, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("base_digest", sa.String(128), nullable=False),
        sa.Column("run_dir", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("heartbeat_at", sa.BigInteger),
        sa.Column("progress", sa.Text, nullable=False),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
        sa.Column("error_param", sa.String(128)),
        sa.Column("adapter_digest", sa.String(71)),
        sa.Column("adapter_version", sa.Integer),
        sa.Column("verdict", sa.String(16)),
        sa.Column("override", sa.Text),
    )


def _make_what_jobs_tell() -> None:
    op.create_table(
        "job_events",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job_number", sa.Integer, sa.ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.UniqueConstraint("job_number", "key", name="uq_job_events_key"),
    )
    op.create_table(
        "job_checkpoints",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job_number", sa.Integer, sa.ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("job_number", "step", name="uq_job_checkpoints_step"),
    )

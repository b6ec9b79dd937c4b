"""The tables, as the code uses them. migrations/ makes them; a test holds the two equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.dialects.postgresql import JSONB

HEAD_REVISION = "0013"

metadata = MetaData()

Value = TypeVar("Value")
_MAX_IN = 500  # values in one IN list; databases bound them


def few_at_a_time(values: Sequence[Value]) -> Iterator[Sequence[Value]]:
    """`values` in parts that fit one IN list."""
    return (values[start : start + _MAX_IN] for start in range(0, len(values), _MAX_IN))


tenants = Table(
    "tenants",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("disabled", Boolean, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("key_hash", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("scopes", String(256)),
    Column("label", String(128)),
)

# What a tenant may use; no row and no value: no limit.
tenant_quotas = Table(
    "tenant_quotas",
    metadata,
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("weight", Float, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("max_concurrent", BigInteger),
    Column("max_adapters", BigInteger),
    Column("max_adapter_bytes", BigInteger),
)

# What is left of a tenant's rates; running: its sequences on each server, {server: [number, when it was written]}. Used
# on PostgreSQL alone, where several servers count together. Times are Unix seconds of the database.
tenant_meters = Table(
    "tenant_meters",
    metadata,
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("requests_capacity", Float),
    Column("requests_level", Float),
    Column("tokens_capacity", Float),
    Column("tokens_level", Float),
    Column("updated_s", Float, nullable=False),
    Column("running", JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    Column("is_taken", Boolean, nullable=False),
)

# Servers on one PostgreSQL. seen_s: the last sign of life, Unix seconds of the database.
servers = Table(
    "servers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("base_digest", String(128), nullable=False),
    Column("base_name", String(256), nullable=False),
    Column("seen_s", Float, nullable=False),
)

# A name keeps its row when its last version is deleted: numbers are never reused, "name@1" means one version for ever.
adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("active_number", Integer),
    Column("last_number", Integer, nullable=False),
    UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_name"),
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("base_digest", String(128), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("target_modules", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("config", LargeBinary, nullable=False),
    Column("unloaded", Boolean, nullable=False, server_default=false()),
    Column("tool_dialect", String(32)),
    Column("chat_template", String(71)),
    Column("invocation_tokens", Text),
    Column("adapter_dtype", String(32)),
    UniqueConstraint("adapter_id", "number", name="uq_adapter_versions_number"),
    UniqueConstraint("adapter_id", "digest", name="uq_adapter_versions_digest"),
    Index("ix_adapter_versions_digest", "digest"),
)

# Versions beside the active one that the bare name also means; the active one has what is left of 100.
alias_weights = Table(
    "alias_weights",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("percent", Integer, nullable=False),
)

# What was active before, the latest last: a stack that rollback pops.
alias_history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Index("ix_alias_history_adapter", "adapter_id"),
)

# By name, not by key: a deleted tenant's usage is still to be billed. day: YYYY-MM-DD, UTC.
usage_days = Table(
    "usage_days",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("tenant", String(128), primary_key=True),
    Column("adapter", String(160), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)

bases = Table(
    "bases",
    metadata,
    Column("digest", String(128), primary_key=True),
    Column("description", Text, nullable=False),
    Column("remembered_at", BigInteger, nullable=False),
)

# Where a host keeps a base, and how a server serves it there: what jobs train on, and how the gate measures.
served_bases = Table(
    "served_bases",
    metadata,
    Column("digest", String(128), primary_key=True),
    Column("host", String(255), primary_key=True),
    Column("name", String(256), nullable=False),
    Column("path", Text, nullable=False),
    Column("dtype", String(32), nullable=False),
    Column("quantize", String(32)),
    Column("device", String(32), nullable=False),
    Column("served_at", BigInteger, nullable=False),
)

# One row. generation: every write adds one; readers that remember answers look here whether they still hold.
# store_id: the same as in the data directory's store.json; NULL until the two are joined.
store_state = Table(
    "store_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("store_id", String(64)),
    CheckConstraint("id = 1", name="ck_store_state_one_row"),
)

# No foreign keys: what was done to a tenant is known after the tenant is gone.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("request_id", String(128)),
    Column("action", String(64), nullable=False),
    Column("tenant", String(128)),
    Column("target", String(256)),
    Column("detail", Text, nullable=False),
    Index("ix_audit_log_tenant", "tenant"),
)

# Digests that are not served, and why.
quarantine = Table(
    "quarantine",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("code", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

# The same for one tenant alone: what its own requests have shown. Others with the same bytes are served.
tenant_quarantine = Table(
    "tenant_quarantine",
    metadata,
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("digest", String(71), primary_key=True, index=True),
    Column("code", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

# Uploaded data. digest: of the blob that holds the bytes, shared by equal files.
files = Table(
    "files",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("digest", String(71), nullable=False, index=True),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

# An onboarding job and how far it is. wanted: "run", "pause" or "cancel", the owner's last word. run_number: counts the
# resumptions. request: what was asked, spec: what is trained, progress: the last step's figures, override: an
# operator's word against the gate; all JSON. run_dir: within the data directory. executor: the kind that runs its
# processes, NULL before they begin. Times are Unix seconds.
jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("status", String(32), nullable=False, index=True),
    Column("wanted", String(16), nullable=False),
    Column("run_number", Integer, nullable=False),
    Column("request", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("base_digest", String(128), nullable=False),
    Column("run_dir", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("heartbeat_at", BigInteger),
    Column("progress", Text, nullable=False),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("error_param", String(128)),
    Column("adapter_digest", String(71)),
    Column("adapter_version", Integer),
    Column("verdict", String(16)),
    Column("override", Text),
    Column("executor", String(32)),
)

# key: the source of the event, so that an event repeated after a crash is kept once.
job_events = Table(
    "job_events",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("job_number", Integer, ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False),
    Column("key", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text, nullable=False),
    UniqueConstraint("job_number", "key", name="uq_job_events_key"),
)

job_checkpoints = Table(
    "job_checkpoints",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("job_number", Integer, ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("metrics", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("job_number", "step", name="uq_job_checkpoints_step"),
)

# Many requests of one file. base_digest: the base that answers them. metadata: JSON. Times are Unix seconds.
batches = Table(
    "batches",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant_id", Integer, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("status", String(16), nullable=False, index=True),
    Column("base_digest", String(128), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False, index=True),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("metadata", Text),
    Column("num_lines", Integer, nullable=False),
    Column("num_completed", Integer, nullable=False),
    Column("num_failed", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("cancelling_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("error_code", String(64)),
    Column("error_message", Text),
)

# A batch's answered lines until it ends. number: the line's place in the file; the key, so no line is kept twice.
# answer: its line of the output file or of the error file.
batch_lines = Table(
    "batch_lines",
    metadata,
    Column(
        "batch_number", Integer, ForeignKey("batches.number", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("status", Integer, nullable=False),
    Column("answer", Text, nullable=False),
)

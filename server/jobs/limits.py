"""How much a tenant may ask of the job runner, how much the runner takes on at once, and the refusals of both."""

from __future__ import annotations

from dataclasses import dataclass, fields

from adapters_store.errors import StoreError

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """Per tenant: bytes and files kept, jobs not yet ended, jobs made in 24 hours. max_file_bytes: of one upload.

    max_rank: what the server's store accepts. max_running: trainings at once, of all tenants. memory_bytes: for all of
    them together (None: whatever is free).
    """

    max_file_bytes: int = 512 * MIB
    max_tenant_bytes: int = 2048 * MIB
    max_tenant_files: int = 1000
    max_active_jobs: int = 8
    max_jobs_per_day: int = 100
    max_rank: int = 256
    max_running: int = 1
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and value <= 0:
                raise ValueError(f"{item.name} must be positive, got {value}")


class JobRefused(StoreError):
    """The file or the job cannot be run; nothing was queued. HTTP 400 (413 for "too_large"), exit code 4."""


class JobLimit(StoreError):
    """The tenant has reached a limit: jobs at once, jobs a day, bytes or files. HTTP 429."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(code, message, param=param)
        self.retry_after_s = retry_after_s

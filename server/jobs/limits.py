"""How much a tenant may ask of the job runner and in batches, how much is taken on at once, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.errors import InputRefused, LimitReached
from server.settings import check_settings, setting

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """Limits of jobs and of their files. max_rank: what the server's store accepts."""

    max_file_bytes: int = setting(512 * MIB, "Maximum size of an uploaded file.", at_least=1)
    max_tenant_bytes: int = setting(2048 * MIB, "Maximum size of all files of a tenant.", at_least=1)
    max_tenant_files: int = setting(1000, "Maximum files of a tenant.", at_least=1)
    max_active_jobs: int = setting(8, "Maximum unfinished jobs of a tenant.", at_least=1)
    max_jobs_per_day: int = setting(100, "Maximum jobs that a tenant creates in 24 hours.", at_least=1)
    max_rank: int = 256
    max_running: int = setting(1, "Maximum trainings at once, of all tenants.", at_least=1)
    max_ranks: int = setting(1, "Maximum processes of a training on one machine, each with a device.", at_least=1)
    max_nodes: int = setting(1, "Maximum machines of a training. More than 1 needs --jobs-executor ray.", at_least=1)
    memory_bytes: int | None = setting(
        None,
        "Memory of all trainings together (default: what is free).",
        at_least=1,
        name="memory_mib",
        factor=MIB,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_rank <= 0:
            raise ValueError(f"max_rank must be positive, got {self.max_rank}")


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Limits of batches. at_once 0: this server answers none; others on the same database may."""

    max_lines: int = setting(50_000, "Maximum requests in the file of a batch.", at_least=1)
    max_active: int = setting(4, "Maximum unfinished batches of a tenant. 0 refuses all.", at_least=0)
    at_once: int = setting(
        4, "Requests of batches that are answered at once while no other request is. 0: none here.", at_least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)


class JobRefused(InputRefused):
    """The file or the job cannot be run; nothing was queued."""


class JobLimit(LimitReached):
    """The tenant has reached a limit: jobs at once, jobs a day, bytes or files."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(code, message, param=param)
        self.retry_after_s = retry_after_s

"""What can be refused of a file or a job before it runs: HTTP 400 and 429, exit code 4."""

from __future__ import annotations

from adapters_store.errors import StoreError


class JobRefused(StoreError):
    """The file or the job is not one we run; nothing was queued. HTTP 400 (413 for "too_large")."""


class JobLimit(StoreError):
    """The tenant has as much as it may have: jobs at once, jobs a day, bytes, files. HTTP 429."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(code, message, param=param)
        self.retry_after_s = retry_after_s

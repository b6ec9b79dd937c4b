"""Everything that can go wrong with an adapter, drawn once. Each error names the field, the value and the limit."""

from __future__ import annotations


class StoreError(Exception):
    """Base of this package's errors. `code` is stable and machine-readable; `param` names the offending field."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class AdapterRejected(StoreError):
    """The uploaded adapter is not one we can serve exactly; nothing was written. HTTP 400 (413 for "too_large")."""


class NotFound(StoreError):
    """No such adapter, version or tenant for this caller. HTTP 404."""


class Conflict(StoreError):
    """The name exists already, or the limit on how many is reached. HTTP 409."""


class BlobDamaged(StoreError):
    """Bytes on disk no longer match their digest. The version is not served. HTTP 503."""


class AdapterUnavailable(StoreError):
    """The adapter cannot be brought to the device (too large for the pool, or its blob is damaged). HTTP 503."""


class StoreUnavailable(StoreError):
    """The database or the data directory does not answer now; the same call may succeed soon. HTTP 503, Retry-After.

    is_away: nobody is answered; else this call alone came at a bad moment (another process held a lock).
    """

    retry_after_s = 2.0

    def __init__(self, code: str, message: str, *, is_away: bool = True) -> None:
        super().__init__(code, message)
        self.is_away = is_away

"""Every error that a user can cause or has to hear of, drawn once, with the HTTP status and the exit status of each.

    UserError                  500  1   code, message, param
      InputRefused             400  4   the input is wrong; nothing was written (413 if the code is too_large)
        AdapterRejected                 the upload is no adapter that can be served exactly
        (InvalidRequest, JobRefused, SpecError, PlanError, DataRejected, LineRefused, MergeRefused: beside their users)
      UnsupportedBase          500  6   in base/families.py
      StoreError               503  1   the disk or the database refuses
        NotFound               404  3
        Conflict               409  5
        BlobDamaged, AdapterUnavailable
        NotCombinable          400
        StoreUnavailable                the same call may succeed soon
      LimitReached             429  1   (JobLimit, QueueFull)
      (ApiError, CommandError: each is raised with its own status)

A message names the field, the value and the limit. No client sees the message of a status 500: it is for operators.
"""

from __future__ import annotations

from enum import IntEnum

_STATUS_OF_CODE = {"too_large": 413}  # the code is more specific than the class


class ExitCode(IntEnum):
    """The exit status of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    CONFLICT = 5
    UNSUPPORTED = 6
    DEVICE_LOST = 7
    INTERRUPTED = 130


class UserError(Exception):
    """Base of all. `code` is stable and machine-readable; `param` names the offending field.

    status: of the HTTP answer. exit_code: of a command. retry_after_s: when the same call may succeed, if it may.
    """

    status: int = 500
    exit_code: ExitCode = ExitCode.FAILED
    retry_after_s: float | None = None

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.status = _STATUS_OF_CODE.get(code, self.status)


class InputRefused(UserError):
    """A field of the input cannot be used: a name, a key's scopes, a line of JSON. Nothing was written."""

    status = 400
    exit_code = ExitCode.REFUSED


class AdapterRejected(InputRefused):
    """The uploaded adapter is not one we can serve exactly; nothing was written."""


class LimitReached(UserError):
    """The tenant or the server has as much as it may have."""

    status = 429


class StoreError(UserError):
    """The disk or the database refuses: disk_full, read_only, wrong_store, database_newer, database_damaged,
    pooler_shares_sessions."""

    status = 503


class NotFound(StoreError):
    """No such adapter, version or tenant for this caller."""

    status = 404
    exit_code = ExitCode.NOT_FOUND


class Conflict(StoreError):
    """The name exists already, or the limit on how many is reached."""

    status = 409
    exit_code = ExitCode.CONFLICT


class BlobDamaged(StoreError):
    """Bytes on disk no longer match their digest. The version is not served."""


class AdapterUnavailable(StoreError):
    """The adapter cannot be brought to the device: it is too large for the pool, or this version refuses it."""


class NotCombinable(StoreError):
    """The adapters that a request names together cannot be added exactly."""

    status = 400
    exit_code = ExitCode.REFUSED


class StoreUnavailable(StoreError):
    """The database or the data directory does not answer now; the same call may succeed soon.

    is_away: every call fails. False: this call alone met another process's lock.
    """

    retry_after_s = 2.0

    def __init__(self, code: str, message: str, *, is_away: bool = True) -> None:
        super().__init__(code, message)
        self.is_away = is_away

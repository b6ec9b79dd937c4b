"""Turns what a user can cause into one line and an exit code. Knows no command; anything it does not know is a fault of
ours and keeps its traceback."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import AdapterRejected, Conflict, NotFound, StoreError
from server.engine.request import InvalidRequest
from server.jobs.limits import JobRefused


class ExitCode(IntEnum):
    """What a shell sees. EPILOG says the same to people."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    CONFLICT = 5
    UNSUPPORTED = 6


EPILOG = (
    "Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not found, 4 refused input, 5 conflict (it exists, or the port is in "
    "use), 6 unsupported base or machine, 130 interrupted. With --json, answers and errors (but wrong usage) are "
    "JSON objects on stdout, one per line."
)


class CommandError(Exception):
    """A command cannot do what was asked. `code` is stable and machine-readable, as the store's and the API's are."""

    def __init__(self, code: str, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Failure:
    """One error as it is told: `code: message`, in one line."""

    code: str
    message: str
    exit_code: ExitCode
    param: str | None = None

    @property
    def line(self) -> str:
        return f"{self.code}: {' '.join(self.message.split())}"

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"code": self.code, "message": self.message, "param": self.param}}


USER_ERRORS = (CommandError, StoreError, UnsupportedBase, InvalidRequest, OSError)

_STORE_EXITS: tuple[tuple[type[StoreError], ExitCode], ...] = (
    (NotFound, ExitCode.NOT_FOUND),
    (AdapterRejected, ExitCode.REFUSED),
    (JobRefused, ExitCode.REFUSED),
    (Conflict, ExitCode.CONFLICT),
    (StoreError, ExitCode.FAILED),
)


def failure_of(error: Exception) -> Failure:
    """What to tell of one of USER_ERRORS."""
    if isinstance(error, CommandError):
        return Failure(error.code, error.message, error.exit_code)
    if isinstance(error, StoreError):
        exit_code = next(code for kind, code in _STORE_EXITS if isinstance(error, kind))
        return Failure(error.code, error.message, exit_code, error.param)
    if isinstance(error, InvalidRequest):
        return Failure(error.code, error.message, ExitCode.REFUSED, error.param)
    if isinstance(error, UnsupportedBase):
        return Failure("unsupported_base", str(error), ExitCode.UNSUPPORTED, "base")
    assert isinstance(error, OSError)
    return _of_system(error)


def _of_system(error: OSError) -> Failure:
    """The system's own words about a file, without errno."""
    reason = error.strerror or str(error)
    message = reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, FileNotFoundError):
        return Failure("file_not_found", message, ExitCode.NOT_FOUND)
    code = "permission_denied" if isinstance(error, PermissionError) else "system_error"
    return Failure(code, message, ExitCode.FAILED)

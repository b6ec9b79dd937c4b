"""Turns errors that a user can cause into one line and an exit code. Knows no command.

Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.errors import ExitCode, UserError

__all__ = ("EPILOG", "USER_ERRORS", "CommandError", "ExitCode", "Failure", "failure_of")

EPILOG = (
    "Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 not found, 4 refused input, 5 conflict (it exists, or the port is in "
    "use), 6 unsupported base or machine, 7 device lost (the GPU failed), 130 interrupted. With --json, answers and "
    "errors (but wrong usage) are JSON objects on stdout, one per line."
)


class CommandError(UserError):
    """A command failed."""

    def __init__(self, code: str, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(code, message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Failure:
    """One error as it is shown: `code: message`, in one line."""

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


USER_ERRORS = (UserError, OSError)


def failure_of(error: Exception) -> Failure:
    """The failure to show for one of USER_ERRORS."""
    if isinstance(error, UserError):
        return Failure(error.code, error.message, error.exit_code, error.param)
    assert isinstance(error, OSError)
    return _of_system(error)


def _of_system(error: OSError) -> Failure:
    """The system's message about a file, without errno."""
    reason = error.strerror or str(error)
    message = reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, FileNotFoundError):
        return Failure("file_not_found", message, ExitCode.NOT_FOUND)
    code = "permission_denied" if isinstance(error, PermissionError) else "system_error"
    return Failure(code, message, ExitCode.FAILED)

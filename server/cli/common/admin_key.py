"""The server's admin key: created once, kept in the data directory, readable by its owner only. Knows no HTTP."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from server.cli.common.failures import CommandError, ExitCode

ENVIRONMENT = "MULTILORA_ADMIN_KEY"
FILE_NAME = "admin.key"
MIN_CHARS = 16
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class AdminKey:
    """values: all valid keys; during a rotation there are two. path None: they came from the environment.
    is_new: the key was created now and is shown only now."""

    values: tuple[str, ...] = field(repr=False)
    path: Path | None
    is_new: bool = False

    @property
    def value(self) -> str:
        return self.values[0]


def admin_key(data_dir: Path) -> AdminKey:
    """The key from MULTILORA_ADMIN_KEY, else from the data directory (which must exist), else a new one kept there.

    Either may hold several keys, separated by spaces or lines: the new one first, then the old one during a rotation.
    """
    given = os.environ.get(ENVIRONMENT)
    if given is not None:
        return AdminKey(_checked(given, ENVIRONMENT), None)
    path = data_dir / FILE_NAME
    is_new = not path.exists() and _write_new(path)
    return AdminKey(_checked(path.read_text(errors="replace"), str(path)), path, is_new)


def _checked(text: str, where: str) -> tuple[str, ...]:
    keys = tuple(text.split())
    for key in keys or ("",):
        if len(key) < MIN_CHARS or not key.isascii() or not key.isprintable():
            message = (
                f"{where}: an admin key must have at least {MIN_CHARS} ASCII characters without spaces, got {len(key)}"
            )
            raise CommandError("bad_admin_key", message, ExitCode.REFUSED)
    return keys


def _write_new(path: Path) -> bool:
    """Write the file atomically and never overwrite one; False if another process was faster."""
    scratch = path.with_name(f".{FILE_NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"ml-admin-{secrets.token_urlsafe(_KEY_BYTES)}\n")
            stream.flush()
            os.fsync(descriptor)
        os.link(scratch, path)
    except FileExistsError:
        return False
    finally:
        scratch.unlink()
    return True

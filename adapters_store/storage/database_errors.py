"""What a database's own error means to a caller: come back soon, no room, or damage. Knows both drivers; no table.

An error that is not named here is a fault of this program, and passes as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapters_store.errors import InputRefused, StoreError, StoreUnavailable

Kind = Literal["full", "read_only", "damaged", "busy", "away"]  # busy: this call alone; away: every call

_OURS = (IntegrityError, ProgrammingError, DataError, NotSupportedError)  # whatever the state of the database

# SQLite's words. An I/O error in a write is what a limit on the file's size looks like to SQLite.
_SQLITE: Mapping[str, Kind] = {
    "disk is full": "full",
    "disk I/O error": "full",
    "readonly": "read_only",
    "malformed": "damaged",
    "not a database": "damaged",
    "locked": "busy",
    "unable to open database file": "away",
    "interrupted": "busy",
    "out of memory": "busy",
}

# PostgreSQL's states, or how they begin. 40: rolled back, to be tried again; 53: no resources; 57: an operator's doing.
_POSTGRES: Mapping[str, Kind] = {
    "53100": "full",
    "25006": "read_only",
    "XX001": "damaged",
    "XX002": "damaged",
    "08": "away",
    "28": "away",
    "3D000": "away",
    "40": "busy",
    "53": "away",
    "55P03": "busy",
    "57014": "busy",
    "57": "away",
    "58": "away",
}


_NUL = "cannot contain NUL"  # psycopg's words; SQLite stores it


@contextmanager
def as_store_errors(*, writes: bool) -> Iterator[None]:
    """Raises StoreUnavailable (store_unavailable), StoreError (disk_full, read_only, database_damaged), InputRefused
    (invalid_value) for a text that the database does not store."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise _refused(f"a lone surrogate at character {error.start}") from error
    except PoolTimeout as error:
        message = "every connection to the database is in use; nothing was stored, try again"
        raise StoreUnavailable("store_unavailable", message, is_away=False) from error
    except DBAPIError as error:
        if isinstance(error, DataError) and _NUL in str(error.orig):
            raise _refused("a NUL character") from error
        kind = kind_of(error)
        if kind is None:
            raise
        raise _answer(kind, error, writes=writes) from error


def _refused(reason: str) -> InputRefused:
    return InputRefused("invalid_value", f"a text of the request holds {reason}, which the database does not store")


def kind_of(error: DBAPIError) -> Kind | None:
    """None: a fault of this program."""
    if isinstance(error, _OURS):
        return None
    if type(error.orig).__module__ == "sqlite3":
        return next((kind for word, kind in _SQLITE.items() if word in str(error.orig)), None)
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # the driver's own: refused, cut off, timed out
        return "away"
    return next((kind for begin, kind in _POSTGRES.items() if state.startswith(begin)), None)


def _answer(kind: Kind, error: DBAPIError, *, writes: bool) -> StoreError:
    reason = " ".join(str(error.orig).split())
    nothing = "nothing was stored" if writes else "nothing was read"
    if kind == "damaged":
        return StoreError("database_damaged", "the database is damaged; restore it from a backup")
    if kind == "full" and writes:
        return StoreError("disk_full", f"the database has no room on its disk ({reason}); {nothing}")
    if kind == "read_only":
        return StoreError("read_only", f"the database cannot be written; {nothing}")
    held = "; another process holds its lock" if kind == "busy" else ""
    message = f"the database does not answer{held}; {nothing}, try again"
    return StoreUnavailable("store_unavailable", message, is_away=kind != "busy" or not writes)

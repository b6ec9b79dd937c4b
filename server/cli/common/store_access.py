"""Opens the data directory for a command, with or without a server running on it. Decides no path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.errors import StoreUnavailable
from adapters_store.storage.reach import DEFAULT_GRACE_S
from server.cli.common.database_url import database_url, shown
from server.cli.common.failures import CommandError
from server.cli.common.output import Output

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore


@contextmanager
def opened(
    data_dir: Path,
    output: Output,
    *,
    url: str | None = None,
    is_private: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
) -> Iterator[AdapterStore]:
    """The store in `data_dir`, closed at the end; its rows are where `url` or the environment says.

    is_private: in `data_dir` whatever the environment says. grace_s: see AdapterStore.open.
    Raises CommandError (database_error, bad_database_url), StoreError (wrong_store and its kin), OSError.
    """
    with output.waiting("opening the store"):
        from sqlalchemy.exc import DBAPIError

        from adapters_store.storage.audit import Actor, acting_as
        from adapters_store.store import AdapterStore

        url = None if is_private else database_url(url)
        place = data_dir if url is None else shown(url)
        try:
            store = AdapterStore.open(data_dir, database_url=url, grace_s=grace_s)
        except DBAPIError as error:
            raise CommandError("database_error", f"{place}: {error.orig}") from error
        except StoreUnavailable as error:
            raise _with_place(error, place) from error
    try:
        with acting_as(Actor(f"cli:uid{os.getuid()}")):
            yield store
    except DBAPIError as error:
        raise CommandError("database_error", f"{place}: {error.orig}") from error
    except StoreUnavailable as error:
        raise _with_place(error, place) from error
    finally:
        store.close()


def _with_place(error: StoreUnavailable, place: Path | str) -> CommandError:
    """An operator needs the driver's words, which no client of the API is given."""
    cause = error.__cause__
    reason = error.message if cause is None else " ".join(str(getattr(cause, "orig", cause)).split())
    return CommandError("database_error" if cause is not None else error.code, f"{place}: {reason}")


def confirmed(question: str, *, yes: bool, output: Output) -> None:
    """Ask before something is lost; a program that asked for JSON is not asked. Raises typer.Abort."""
    if not (yes or output.as_json):
        import typer

        typer.confirm(question, abort=True)

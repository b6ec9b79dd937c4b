"""Opens the data directory for a command, with or without a server running on it. Decides no path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.storage.availability import DEFAULT_GRACE_S
from server.cli.common.database_url import database_url, remote_from_environment, shown
from server.cli.common.failures import CommandError
from server.cli.common.output import Output

if TYPE_CHECKING:
    from adapters_store.remote.settings import RemoteSettings
    from adapters_store.store import AdapterStore


@contextmanager
def opened(
    data_dir: Path,
    output: Output,
    *,
    url: str | None = None,
    is_private: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    remote: RemoteSettings | None = None,
) -> Iterator[AdapterStore]:
    """The store in `data_dir`, closed at the end; its rows are in the database that `url` or the environment names.

    is_private: in `data_dir`, whatever the environment names. grace_s: see AdapterStore.open. remote: the object store
    that holds the blobs; None: the one that the environment names, if it does.
    Raises CommandError (database_error, bad_database_url), StoreError (wrong_store and others), OSError.
    """
    with output.waiting("opening the store"):
        from adapters_store.storage.audit import Actor, acting_as
        from adapters_store.store import AdapterStore

        url = None if is_private else database_url(url)
        remote = None if is_private else remote or remote_from_environment()
        place = data_dir if url is None else shown(url)
        with _database_errors(place):
            store = AdapterStore.open(data_dir, database_url=url, grace_s=grace_s, remote=remote)
    try:
        with acting_as(Actor(f"cli:uid{os.getuid()}")), _database_errors(place):
            yield store
    finally:
        store.close()


@contextmanager
def _database_errors(place: Path | str) -> Iterator[None]:
    """CommandError with the place and the driver's words: an operator needs them, no client of the API gets them."""
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except DBAPIError as error:
        raise CommandError("database_error", f"{place}: {error.orig}") from error
    except StoreError as error:
        if not isinstance(error, StoreUnavailable) and error.code != "database_damaged":
            raise
        cause = error.__cause__
        reason = error.message if cause is None else " ".join(str(getattr(cause, "orig", cause)).split())
        raise CommandError("database_error" if cause is not None else error.code, f"{place}: {reason}") from error


def confirmed(question: str, *, yes: bool, output: Output) -> None:
    """Ask before data is deleted, but not with --json. Raises typer.Abort."""
    if not (yes or output.as_json):
        import typer

        typer.confirm(question, abort=True)

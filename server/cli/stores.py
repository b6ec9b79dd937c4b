"""Opens the data directory for a command, with or without a server running on it. Decides no path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.failures import CommandError
from server.cli.output import Output

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore


@contextmanager
def opened(data_dir: Path, output: Output) -> Iterator[AdapterStore]:
    """The store in `data_dir`, closed at the end. Raises CommandError (database_error), StoreError, OSError."""
    with output.waiting("opening the store"):
        from sqlalchemy.exc import DBAPIError

        from adapters_store.audit import Actor, acting_as
        from adapters_store.store import AdapterStore

        try:
            store = AdapterStore.open(data_dir)
        except DBAPIError as error:
            raise CommandError("database_error", f"{data_dir}: {error.orig}") from error
    try:
        with acting_as(Actor(f"cli:uid{os.getuid()}")):
            yield store
    except DBAPIError as error:
        raise CommandError("database_error", f"{data_dir}: {error.orig}") from error
    finally:
        store.close()


def confirmed(question: str, *, yes: bool, output: Output) -> None:
    """Ask before something is lost; a program that asked for JSON is not asked. Raises typer.Abort."""
    if not (yes or output.as_json):
        import typer

        typer.confirm(question, abort=True)

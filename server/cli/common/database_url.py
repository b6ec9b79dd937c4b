"""Which database a command works on: --database-url, else MULTILORA_DATABASE_URL, else SQLite in the data directory.

Decides which URLs are valid, and shows them without their secrets. Connects to nothing. Where the blobs are, the
environment says too.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from adapters_store.remote.settings import RemoteSettings
from server.cli.common.failures import CommandError, ExitCode

ENVIRONMENT = "MULTILORA_DATABASE_URL"
DRIVERS = ("sqlite", "postgresql+psycopg")
_SECRET_QUERIES = ("password", "sslpassword")

DATABASE_URL_HELP = (
    "PostgreSQL instead of SQLite in --data-dir. Other users of this machine can see options: keep a password in "
    f"{ENVIRONMENT}."
)
DatabaseUrlOption = Annotated[str | None, typer.Option("--database-url", help=DATABASE_URL_HELP, metavar="URL")]


def database_url(given: str | None) -> str | None:
    """The checked URL with its driver, secrets included; None: SQLite in the data directory.

    Raises CommandError (bad_database_url), whose message repeats no part of the URL but its scheme.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from_environment = os.environ.get(ENVIRONMENT)
    text = given or from_environment
    source = ENVIRONMENT if text == from_environment else "--database-url"
    if not text:
        return None
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number; its message repeats the URL
        raise _refused(source, "is not a URL like postgresql://USER:PASSWORD@HOST/DATABASE") from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in DRIVERS:
        raise _refused(source, f"{url.drivername!r} is not supported; {' and '.join(DRIVERS)} are")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise _refused(source, "a database in memory is not shared with the job worker; name a file")
    try:
        url.get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        raise _refused(source, f"{url.drivername!r} needs {error.name}: pip install 'multilora[postgres]'") from None
    return url.render_as_string(hide_password=False)


def shown(url: str) -> str:
    """The URL for people and logs: *** replaces its secrets."""
    from sqlalchemy import make_url

    made = make_url(url)
    hidden = {name: "***" for name in _SECRET_QUERIES if name in made.query}
    return made.update_query_dict(hidden).render_as_string(hide_password=True)


def remote_from_environment() -> RemoteSettings | None:
    """The object store of the blobs, for commands without the option. Raises CommandError (bad_setting)."""
    try:
        return RemoteSettings.from_environment()
    except ValueError as error:
        raise CommandError("bad_setting", str(error), ExitCode.USAGE) from error


def _refused(source: str, reason: str) -> CommandError:
    return CommandError("bad_database_url", f"{source}: {reason}", ExitCode.REFUSED)

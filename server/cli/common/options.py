"""Options that several commands share: names, help and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.common.output import complain

DEFAULT_DATA_DIR = Path("~/.local/share/multilora")
DATA_DIR_HELP = "The folder of tenants, adapters, jobs and the admin key."
HOST_HELP = "Address to listen on."
PORT_HELP = "Port to listen on; 0: a free one."
JSON_KEY = "multilora.json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    """So that an error has the form of the answer."""
    context.meta[JSON_KEY] = value
    return value


def _expanded(value: Path | None) -> Path | None:
    return None if value is None else value.expanduser()


def renamed_option(old: str, new: str) -> Any:
    """The old spelling of an option, for one release: hidden, works, and warns on stderr."""

    def warned(value: Any) -> Any:
        if value is not None:
            complain(f"{old} is now {new}; the old spelling will be removed in the next release")
        return value

    return typer.Option(old, hidden=True, callback=warned)


JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Answer as JSON, one object per line.", callback=_remember_json, is_eager=True),
]
DataDirOption = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="MULTILORA_DATA_DIR",
        help=DATA_DIR_HELP,
        callback=_expanded,
        file_okay=False,
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
TenantOption = Annotated[str, typer.Option("--tenant", "-t", help="The adapter's tenant.", metavar="T")]
HostOption = Annotated[str, typer.Option("--host", help=HOST_HELP)]
PortOption = Annotated[int, typer.Option("--port", help=PORT_HELP, min=0, max=65535)]

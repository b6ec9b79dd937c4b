"""The options that several commands share. Decides their names, help and defaults; does nothing with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
TenantOption = Annotated[str, typer.Option("--tenant", "-t", help="Whose adapter it is.", metavar="T")]
HostOption = Annotated[str, typer.Option("--host", help=HOST_HELP)]
PortOption = Annotated[int, typer.Option("--port", help=PORT_HELP, min=0, max=65535)]

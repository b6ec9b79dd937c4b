"""`multilora quarantine`: which adapters are not served and why. Works with or without a running server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.common.texts import when

app = typer.Typer(help="Check the adapters' files; list quarantined adapters and release them.", no_args_is_help=True)


@app.command("list")
def list_entries(data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """List the quarantined adapters, which are not served."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        entries = store.quarantine.entries()
    output.emit(data=[asdict(entry) for entry in entries])
    if not entries:
        output.say("nothing is in quarantine")
        return
    rows = [
        (entry.digest, entry.tenant or "all", entry.code, entry.message, when(entry.created_at)) for entry in entries
    ]
    output.table(("digest", "tenant", "code", "reason", "since"), rows)


@app.command()
def check(data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """Check every version's files, as a server does at its start."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        found = store.check_integrity()
    known = {"quarantined": found.quarantined, "put_away": found.quarantined}  # the latter for one release
    output.emit(blobs=found.num_blobs, **known, restored=found.restored)
    output.say(f"{found.num_blobs} blobs: {len(found.quarantined)} quarantined, {len(found.restored)} restored")


@app.command()
def release(
    digest: Annotated[str, typer.Argument(help="The adapter's digest, as `list` shows it.", metavar="DIGEST")],
    tenant: Annotated[
        str | None, typer.Option(help="Release it for this tenant only (default: for all).", metavar="NAME")
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Serve an adapter again. A running server does so within a second."""
    from adapters_store.base.description import AdapterDigest

    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        store.quarantine.release(AdapterDigest(digest), tenant=tenant)
    output.emit(digest=digest, **({} if tenant is None else {"tenant": tenant}), released=True)
    output.say(f"released {digest}")

"""`multilora audit`: changes to tenants, keys and adapters. Works with or without a running server."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.common.texts import when

if TYPE_CHECKING:
    from adapters_store.storage.audit import AuditEntry


def audit(
    *,
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only changes to this tenant.")] = None,
    limit: Annotated[int, typer.Option(help="Maximum entries.", min=1, max=10_000)] = 50,
    before: Annotated[int | None, typer.Option(help="Only entries before this number.", min=1)] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Show changes and their actors, newest first. Entries are kept for 400 days, at most 200,000."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        entries = store.audit.entries(tenant=tenant, before=before, limit=limit)
    output.emit(data=[asdict(entry) for entry in entries])
    if not entries:
        output.say("no entries yet")
        return
    output.table(("", "when", "who", "did", "tenant", "to", "more"), [_row(entry) for entry in entries])


def _row(entry: AuditEntry) -> tuple[str, ...]:
    more = json.dumps(entry.detail) if entry.detail else ""
    return str(entry.id), when(entry.at), entry.actor, entry.action, entry.tenant or "", entry.target or "", more

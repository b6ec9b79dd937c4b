"""`multilora tenant`: tenants and their state. Works with or without a running server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from adapters_store.accounts.records import MAX_OVERLAP_S
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, YesOption
from server.cli.common.output import Output
from server.cli.common.store_access import confirmed, opened
from server.cli.common.texts import when
from server.cli.tenants import keys as tenant_keys
from server.cli.tenants.keys import NameArgument, show_key
from server.cli.tenants.quota import quota

app = typer.Typer(help="Create, list, disable and delete tenants; their keys.", no_args_is_help=True)
app.add_typer(tenant_keys.app, name="key")
app.command("quota")(quota)


@app.command()
def create(name: NameArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """Create a tenant and print its API key, which is shown only now."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        show_key(output, store.tenants.create(name))


@app.command("list")
def list_tenants(data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """List the tenants and how many adapters each has."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        tenants = store.tenants.list_tenants()
        counts = Counter(version.tenant for version in store.list_versions())
    output.emit(
        data=[
            {"tenant": t.name, "created": t.created_at, "disabled": t.disabled, "adapters": counts[t.name]}
            for t in tenants
        ]
    )
    if not tenants:
        output.say("no tenants yet: multilora tenant create NAME")
        return
    rows = [(t.name, str(counts[t.name]), when(t.created_at), "disabled" if t.disabled else "") for t in tenants]
    output.table(("tenant", "adapters", "created", ""), rows)


@app.command("rotate-key")
def rotate_key(
    name: NameArgument,
    overlap_s: Annotated[
        int, typer.Option(help="Seconds for which the old key stays valid, at most 30 days.", min=0, max=MAX_OVERLAP_S)
    ] = 0,
    key: Annotated[int | None, typer.Option(help="Replace only the key of this id (default: all keys).", min=1)] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Give a tenant a new API key; the old one becomes invalid."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        show_key(output, store.tenants.rotate_key(name, overlap_s, key))


@app.command()
def disable(name: NameArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """Make a tenant's keys invalid until the tenant is enabled again."""
    _set_disabled(name, data_dir, as_json, disabled=True)


@app.command()
def enable(name: NameArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """Make a disabled tenant's keys valid again."""
    _set_disabled(name, data_dir, as_json, disabled=False)


def _set_disabled(name: str, data_dir: Path, as_json: bool, *, disabled: bool) -> None:
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        store.tenants.set_disabled(name, disabled)
    output.emit(tenant=name, disabled=disabled)
    output.say(f"tenant {name} is {'disabled' if disabled else 'enabled'}")


@app.command()
def delete(
    name: NameArgument,
    yes: YesOption = False,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant, its keys and its adapters."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        store.tenants.get(name)
        count = len(store.list_versions(name))
        confirmed(f"Delete tenant {name}, its keys and its {count} adapters?", yes=yes, output=output)
        digests = store.tenants.delete(name)
    output.emit(tenant=name, deleted=True, digests=digests)
    output.say(f"deleted tenant {name}")

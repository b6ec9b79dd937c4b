"""`multilora tenant key`: a tenant's keys, their scopes and expiry. Works with or without a running server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.common.texts import when

if TYPE_CHECKING:
    from adapters_store.accounts.records import TenantKey

NameArgument = Annotated[str, typer.Argument(help="The tenant's name.", metavar="NAME")]

app = typer.Typer(help="Create, list and revoke a tenant's keys.", no_args_is_help=True)

_DAY_S = 86_400


@app.command()
def create(
    name: NameArgument,
    *,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="inference, adapters, jobs or read; may be repeated (default: all)."),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(help="Days until the key expires (default: never).", min=0.0, max=36_500.0),
    ] = None,
    label: Annotated[str | None, typer.Option(help="A note on the key's use.")] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Create another key and print it; it is shown only now."""
    from adapters_store.accounts.keys import KeySpec, parse_scopes

    output = Output(as_json=as_json)
    scopes = parse_scopes(scope) if scope else None
    ending = None if days is None else int(time.time() + days * _DAY_S)
    with opened(data_dir, output) as store:
        show_key(output, store.tenants.create_key(name, KeySpec(scopes, ending, label)))


@app.command("list")
def list_keys(name: NameArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """List a tenant's keys, expired ones too. The key itself is not stored and cannot be shown."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        keys = store.tenants.keys(name)
    output.emit(
        data=[
            {
                "id": key.key_id,
                "label": key.label,
                "scopes": sorted(key.scopes),
                "created": key.created_at,
                "expires_at": key.expires_at,
            }
            for key in keys
        ]
    )
    rows = [
        (
            str(key.key_id),
            key.label or "",
            " ".join(sorted(key.scopes)),
            when(key.created_at),
            "never" if key.expires_at is None else when(key.expires_at),
        )
        for key in keys
    ]
    output.table(("id", "label", "scopes", "created", "expires"), rows)


@app.command()
def revoke(
    name: NameArgument,
    key_id: Annotated[int, typer.Argument(help="The key's id, as `list` shows it.", metavar="ID")],
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Revoke a key now. A running server accepts it for at most one more second."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        store.tenants.revoke_key(name, key_id)
    output.emit(tenant=name, key=key_id, revoked=True)
    output.say(f"revoked key {key_id} of tenant {name}")


def show_key(output: Output, key: TenantKey) -> None:
    """Print a new key; it is shown only now."""
    output.emit(tenant=key.tenant, api_key=key.api_key)
    output.say(f"tenant   {key.tenant}")
    output.say(f"api key  {key.api_key}")
    output.say("The key is shown only now; `multilora tenant rotate-key` creates another.", style="dim")

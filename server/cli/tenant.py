"""`multilora tenant`: who may ask. Works on the data directory, whether or not a server runs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, YesOption
from server.cli.output import Output
from server.cli.stores import confirmed, opened
from server.cli.texts import when

if TYPE_CHECKING:
    from adapters_store.records import TenantKey

app = typer.Typer(help="Create, list and delete tenants; rotate their keys.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The tenant's name.", metavar="NAME")]


@app.command()
def create(name: NameArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """Make a tenant and print its API key, which is shown this once."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        _tell_key(output, store.tenants.create(name))


@app.command("list")
def list_tenants(data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False) -> None:
    """List the tenants and how many adapters each has."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        tenants = store.tenants.list()
        counts = _count_by_tenant([version.tenant for version in store.list()])
    output.emit(
        data=[
            {"tenant": t.name, "created": t.created_at, "disabled": t.disabled, "adapters": counts.get(t.name, 0)}
            for t in tenants
        ]
    )
    if not tenants:
        output.say("no tenants yet: multilora tenant create NAME")
        return
    rows = [(t.name, str(counts.get(t.name, 0)), when(t.created_at), "disabled" if t.disabled else "") for t in tenants]
    output.table(("tenant", "adapters", "created", ""), rows)


@app.command("rotate-key")
def rotate_key(
    name: NameArgument,
    overlap_s: Annotated[int, typer.Option(help="Seconds for which the old key still opens.", min=0)] = 0,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Give a tenant a new API key; the old one opens nothing from then on."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        _tell_key(output, store.tenants.rotate_key(name, overlap_s))


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
        count = len(store.list(name))
        confirmed(f"Delete tenant {name}, its keys and its {count} adapters?", yes=yes, output=output)
        digests = store.tenants.delete(name)
    output.emit(tenant=name, deleted=True, digests=digests)
    output.say(f"deleted tenant {name}")


def _tell_key(output: Output, key: TenantKey) -> None:
    output.emit(tenant=key.tenant, api_key=key.api_key)
    output.say(f"tenant   {key.tenant}")
    output.say(f"api key  {key.api_key}")
    output.say("The key is shown this once; `multilora tenant rotate-key` makes another.", style="dim")


def _count_by_tenant(tenants: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tenant in tenants:
        counts[tenant] = counts.get(tenant, 0) + 1
    return counts

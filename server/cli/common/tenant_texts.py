"""What the tenant commands share: their argument, and how a key is told. Knows no store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.output import Output

if TYPE_CHECKING:
    from adapters_store.versions.records import TenantKey

NameArgument = Annotated[str, typer.Argument(help="The tenant's name.", metavar="NAME")]


def tell_key(output: Output, key: TenantKey) -> None:
    """The one time it is shown."""
    output.emit(tenant=key.tenant, api_key=key.api_key)
    output.say(f"tenant   {key.tenant}")
    output.say(f"api key  {key.api_key}")
    output.say("The key is shown this once; `multilora tenant rotate-key` makes another.", style="dim")

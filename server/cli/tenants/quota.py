"""`multilora tenant quota`: what a tenant may use. Works with or without a running server."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.tenants.keys import NameArgument

_TEXTS = {
    "weight": "Weight in fair sharing; other tenants have 1.",
    "requests_per_minute": "Maximum requests per minute.",
    "tokens_per_minute": "Maximum tokens per minute, of prompts and answers.",
    "max_concurrent": "Maximum sequences running or queued.",
    "max_adapters": "Maximum adapter versions.",
    "max_adapter_bytes": "Maximum bytes of all versions, packed.",
}


def quota(
    name: NameArgument,
    *,
    weight: Annotated[float | None, typer.Option(help=_TEXTS["weight"], min=0.01, max=100.0)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help=_TEXTS["requests_per_minute"], min=0)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help=_TEXTS["tokens_per_minute"], min=0)] = None,
    max_concurrent: Annotated[int | None, typer.Option(help=_TEXTS["max_concurrent"], min=0)] = None,
    max_adapters: Annotated[int | None, typer.Option(help=_TEXTS["max_adapters"], min=0)] = None,
    max_adapter_bytes: Annotated[int | None, typer.Option(help=_TEXTS["max_adapter_bytes"], min=0)] = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="Remove all limits first.")] = False,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Show a tenant's quotas, or change those that are given."""
    given: dict[str, Any] = {
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "max_adapters": max_adapters,
        "max_adapter_bytes": max_adapter_bytes,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        from adapters_store.accounts.records import UNLIMITED

        store.tenants.get(name)
        quotas = replace(UNLIMITED if unlimited else store.quotas.get(name), **changes)
        if changes or unlimited:
            store.quotas.set(name, quotas)
    output.emit(tenant=name, **asdict(quotas))
    rows = [(_TEXTS[field], "no limit" if value is None else f"{value:g}") for field, value in asdict(quotas).items()]
    output.table((f"tenant {name}", ""), rows)

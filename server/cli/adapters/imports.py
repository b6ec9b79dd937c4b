"""`multilora adapter import`: an adapter from a place of an object store, or from a folder such as a hub cache's.

The command's user is the operator, so no list of allowed places applies; everything else is checked as the server does.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from server.cli.adapters.publishing import base_for, check_free, int8_change_on, show_published
from server.cli.common.base_path import BaseOption
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.common.texts import MIB

SOURCE_HELP = "s3://BUCKET/PATH, gs://, az:// or a folder; credentials and endpoint come from the environment."


def import_adapter(
    name: Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME")],
    *,
    source: Annotated[str, typer.Option("--source", "-s", help=SOURCE_HELP, metavar="PLACE")],
    tenant: TenantOption,
    base: BaseOption = None,
    activate: Annotated[bool, typer.Option(help="Make the new version the active one.")] = True,
    max_adapter_bytes: Annotated[
        int,
        typer.Option(help="Maximum size of the weights, as of serve.", envvar="MULTILORA_MAX_ADAPTER_BYTES", min=1),
    ] = 1024 * MIB,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Fetch an adapter from an object store or a hub cache, check it as an upload and publish it as a new version."""
    from adapters_store.remote.imports import ImportLimits, fetch_import
    from adapters_store.storage.names import check_name

    output = Output(as_json=as_json)
    check_name("name", name)
    place = source if "://" in source else str(Path(source).absolute())
    limits = ImportLimits(None, MIB, max_adapter_bytes)
    # On the store's own disk, so that the weights are moved and not copied.
    with opened(data_dir, output) as store, TemporaryDirectory(prefix="import-", dir=data_dir) as folder:
        weights = Path(folder) / "weights.part"
        store.tenants.get(tenant)
        description = base_for(store, base, output)
        check_free(name, description)
        with output.waiting(f"fetching {source}"):
            config = fetch_import(place, weights, limits, store.require_room)
        with output.waiting("checking the adapter"):
            version = store.publish(
                tenant=tenant,
                name=name,
                config=config,
                weights=weights,
                base=description,
                activate=activate,
                takes_file=True,
                int8_change=int8_change_on(description),
            )
    show_published(output, version)

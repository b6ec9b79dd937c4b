"""`multilora adapter activate|canary|promote|rollback|unload`: which version a name stands for.

A running server follows within a second. The store decides what each command does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore
    from adapters_store.versions.aliases import AliasStore
    from adapters_store.versions.records import AdapterVersion

VersionArgument = Annotated[str, typer.Argument(help="NAME@VERSION.", metavar="NAME@VERSION")]
RefArgument = Annotated[str, typer.Argument(help="NAME, or NAME@VERSION.", metavar="NAME[@VERSION]")]
NameArgument = Annotated[str, typer.Argument(help="NAME.", metavar="NAME")]


def activate(
    ref: VersionArgument, tenant: TenantOption, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False
) -> None:
    """Make this version the only active one. An unloaded version returns to service."""
    name, number = _version_of(ref)
    _change(lambda aliases: aliases.activate(tenant, name, number), data_dir, as_json=as_json)


def canary(
    ref: VersionArgument,
    tenant: TenantOption,
    percent: Annotated[
        int, typer.Option(help="Share of the users that the canary answers; 0 ends the canary.", min=0, max=99)
    ],
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Let this version answer a share of the users, always the same users."""
    name, number = _version_of(ref)
    _change(lambda aliases: aliases.set_canary(tenant, name, number, percent), data_dir, as_json=as_json)


def promote(
    ref: RefArgument, tenant: TenantOption, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False
) -> None:
    """Make the canary the active version. If there are several, give NAME@VERSION."""
    from adapters_store.storage.names import split_ref

    _change(lambda aliases: aliases.promote(tenant, *split_ref(ref)), data_dir, as_json=as_json)


def rollback(
    name: NameArgument, tenant: TenantOption, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False
) -> None:
    """End the canaries. If there are none, activate the previous version."""
    _change(lambda aliases: aliases.roll_back(tenant, name), data_dir, as_json=as_json)


def unload(
    ref: RefArgument, tenant: TenantOption, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False
) -> None:
    """Take an adapter, or one version, out of service and out of memory until it is activated again. Files stay."""
    from adapters_store.storage.names import split_ref

    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        digests = store.aliases.unload(tenant, *split_ref(ref))
    output.emit(tenant=tenant, adapter=ref, unloaded=True, digests=digests)
    output.say(f"unloaded {tenant}/{ref}; multilora adapter activate NAME@VERSION brings it back")


def register(app: typer.Typer) -> None:
    """Add the commands to `multilora adapter`."""
    for command in (activate, canary, promote, rollback, unload):
        app.command()(command)


def _version_of(ref: str) -> tuple[str, int]:
    from adapters_store.storage.names import split_ref

    name, number = split_ref(ref)
    if number is None:
        raise CommandError("bad_version", f"{ref}: give the version, as in {name}@3", ExitCode.USAGE)
    return name, number


def _change(change: Callable[[AliasStore], AdapterVersion], data_dir: Path, *, as_json: bool) -> None:
    """Then show the versions that the name stands for now."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        _show_shares(store, change(store.aliases), output)


def _show_shares(store: AdapterStore, version: AdapterVersion, output: Output) -> None:
    versions = store.versions(version.tenant, version.name)
    output.emit(**version.to_json(), versions=[each.to_json() for each in versions])
    shares = ", ".join(f"{each.ref} {each.percent} %" for each in versions if each.percent)
    output.say(f"{version.tenant}/{version.name} is answered by {shares or 'nothing'}")

"""`multilora adapter`: tenants' LoRA adapters in the data directory. A running server serves them within a second.

The store decides which adapter is valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.adapters import export as adapter_export
from server.cli.adapters import imports as adapter_imports
from server.cli.adapters import merge as adapter_merge
from server.cli.adapters import versions as adapter_versions
from server.cli.adapters.publishing import base_for, check_free, int8_change_on, show_published
from server.cli.adapters.versions import RefArgument
from server.cli.common.base_path import BaseOption
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption, YesOption
from server.cli.common.output import Output
from server.cli.common.store_access import confirmed, opened
from server.cli.common.texts import size, when

if TYPE_CHECKING:
    from adapters_store.versions.records import AdapterVersion

app = typer.Typer(
    help="Push, list, show and delete tenants' adapters; choose the active version.", no_args_is_help=True
)

adapter_versions.register(app)
app.command("import")(adapter_imports.import_adapter)
app.command()(adapter_merge.merge)
app.command()(adapter_export.export)


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="A PEFT LoRA folder, a checkpoint, or a hub cache's folder of one.", metavar="DIR")
    ],
    *,
    tenant: TenantOption,
    name: Annotated[str, typer.Option("--name", "-n", help="The adapter's name.", metavar="N")],
    base: BaseOption = None,
    activate: Annotated[bool, typer.Option(help="Make the new version the active one.")] = True,
    tool_dialect: Annotated[
        str | None, typer.Option(help="How its tool calls are written, if not as the base's.", metavar="NAME")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Its own chat template, a Jinja file of 64 KiB at most.", metavar="FILE")
    ] = None,
    adapter_dtype: Annotated[
        str | None,
        typer.Option(help="int8: half the memory; the base is loaded to measure the change.", metavar="DTYPE"),
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter and publish it as a new version, which becomes the active one."""
    from adapters_store.format.adapter_folder import read_adapter_folder
    from server.cli.adapters.bin_weights import as_safetensors

    output = Output(as_json=as_json)
    if not folder.is_dir():
        raise CommandError("file_not_found", f"{folder}: no such folder", ExitCode.NOT_FOUND)
    found = read_adapter_folder(folder)
    with opened(data_dir, output) as store:
        description = base_for(store, base, output)
        check_free(name, description)
        with output.waiting("checking the adapter"), as_safetensors(found.weights, data_dir) as weights:
            version = store.publish(
                tenant=tenant,
                name=name,
                config=found.config,
                weights=weights,
                base=description,
                activate=activate,
                tool_dialect=tool_dialect,
                chat_template=_template_text(chat_template),
                adapter_dtype=adapter_dtype,
                int8_change=int8_change_on(description),
            )
    show_published(output, version, found.notes)


def _template_text(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise CommandError("file_not_found", f"{path}: no such file", ExitCode.NOT_FOUND)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CommandError("bad_chat_template", f"{path}: byte {error.start} is not UTF-8", ExitCode.REFUSED) from None


@app.command("list")
def list_adapters(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's.", metavar="T")] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """List the active version of every adapter."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        if tenant is not None:
            store.tenants.get(tenant)
        versions = store.list_versions(tenant)
    output.emit(data=[version.to_json() for version in versions])
    if not versions:
        output.say("no adapters yet: multilora adapter push DIR --tenant T --name N")
        return
    _show_versions(output, versions)


@app.command()
def show(
    ref: RefArgument, tenant: TenantOption, data_dir: DataDirOption = DEFAULT_DATA_DIR, as_json: JsonOption = False
) -> None:
    """Show an adapter and all its versions, or one version."""
    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        version = store.resolve(tenant, ref)
        versions = store.versions(tenant, version.name)
    output.emit(**version.to_json(), versions=[each.to_json() for each in versions])
    of_base = "the base's"
    output.say(f"adapter  {version.tenant}/{version.ref}")
    output.say(f"digest   {version.digest}")
    output.say(f"base     {version.base_digest}")
    output.say(f"rank     {version.rank}, on {', '.join(version.target_modules)}")
    output.say(f"dtype    {version.adapter_dtype or of_base}")
    if version.tool_dialect is not None or version.chat_template is not None:
        template = version.chat_template or of_base
        output.say(f"chats    tool dialect {version.tool_dialect or 'by the template'}, chat template {template}")
    _show_versions(output, versions)


@app.command()
def delete(
    ref: RefArgument,
    tenant: TenantOption,
    yes: YesOption = False,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter with all its versions, or one version. Running requests finish."""
    from adapters_store.storage.names import split_ref

    output = Output(as_json=as_json)
    with opened(data_dir, output) as store:
        name, number = split_ref(ref)
        what = (
            f"{ref} of {tenant}" if number else f"{name} of {tenant} with {len(store.versions(tenant, name))} versions"
        )
        confirmed(f"Delete {what}?", yes=yes, output=output)
        digests = store.delete(tenant, ref)
    output.emit(tenant=tenant, adapter=ref, deleted=True, digests=digests)
    output.say(f"deleted {tenant}/{ref}")


def _show_versions(output: Output, versions: list[AdapterVersion]) -> None:
    rows = [
        (
            v.tenant,
            v.ref,
            _state(v),
            str(v.rank),
            size(v.num_bytes) if v.adapter_dtype is None else f"{size(v.num_bytes)}, {v.adapter_dtype}",
            when(v.created_at),
            v.digest[:19],
        )
        for v in versions
    ]
    output.table(("tenant", "adapter", "", "rank", "size", "created", "digest"), rows)


def _state(version: AdapterVersion) -> str:
    if not version.loaded:
        return "unloaded"
    return "active" if version.percent == 100 else f"{version.percent} %" if version.percent else ""

"""`multilora adapter merge`: an adapter and its base as one base. The trainer computes and checks the merge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.adapters.versions import RefArgument
from server.cli.common.base_path import describe, faults_of_the_base, find_base
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened

if TYPE_CHECKING:
    from adapters_store.base.description import BaseDescription
    from adapters_store.store import AdapterStore
    from adapters_store.versions.records import AdapterVersion
    from trainer.merge import Merged


def merge(
    ref: RefArgument,
    *,
    tenant: TenantOption,
    base: Annotated[str, typer.Option("--base", help="The adapter's base, unquantised.", metavar="PATH_OR_ID")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.", metavar="DIR")],
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="nf4 is always refused; the message gives the measured loss.")
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base and write the result, if its answers are the same."""
    output = Output(as_json=as_json)
    if quantize not in (None, "nf4"):
        raise CommandError("bad_field", f"--quantize must be nf4, got {quantize!r}", ExitCode.REFUSED)
    with opened(data_dir, output) as store, fetched(store, tenant, ref) as (version, folder):
        path, name, description = base_of(store, version, base, output)
        with faults_of_the_base(Path(base)):
            merged = merged_into(out, path, folder, description, output, nf4=quantize == "nf4")
    output.emit(**asdict(merged), adapter=version.digest, folder=str(out), lost=merged.parity.lost)
    output.say(f"wrote {out}: {merged.num_modules} layers merged, stored in {merged.dtype}")
    output.say(f"parity  {merged.parity}")
    output.say(f"digest  {merged.digest}, a new base: it refuses adapters of {name}", style="dim")


def base_of(
    store: AdapterStore, version: AdapterVersion, base: str, output: Output
) -> tuple[Path, str, BaseDescription]:
    """The folder, name and description of the base that the version was trained for, proved to be that one.

    Raises CommandError, AdapterRejected, UnsupportedBase."""
    with faults_of_the_base(Path(base)):
        path, name = find_base(base, output)
        description = describe(path, name)
        if description.digest != version.base_digest:
            message = f"{version.ref}: trained for base {version.base_digest}, {base} is {description.digest}"
            raise CommandError("wrong_base", message, ExitCode.REFUSED)
        store.verify(version.digest, description)
    return path, name, description


def merged_into(
    out: Path, base: Path, adapter: Path, description: BaseDescription, output: Output, *, nf4: bool = False
) -> Merged:
    """`out` written as one base from base and adapter. Raises MergeRefused, AdapterRejected, UnsupportedBase."""
    from transformers.utils.logging import disable_progress_bar

    from trainer.merge import merge as merge_folders

    disable_progress_bar()
    with output.stage(f"merging the adapter into {description.name}, and comparing answers"):
        return merge_folders(base, adapter, out, description=description, nf4=nf4)


@contextmanager
def fetched(store: AdapterStore, tenant: str, ref: str) -> Iterator[tuple[AdapterVersion, Path]]:
    """The version, and a folder with its two files as they were uploaded."""
    from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE

    version = store.resolve(tenant, ref)
    with tempfile.TemporaryDirectory(prefix="multilora-merge-") as scratch:
        folder = Path(scratch)
        (folder / CONFIG_FILE).write_bytes(store.config_of(version))
        (folder / WEIGHTS_FILE).symlink_to(store.weights_of(version.digest).resolve())
        yield version, folder

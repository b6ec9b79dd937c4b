"""`multilora adapter export`: a version as a folder that PEFT, hubs and other servers read, with its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.adapters.versions import RefArgument
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore
    from adapters_store.versions.records import AdapterVersion

CARD = "README.md"


def export(
    ref: RefArgument,
    *,
    tenant: TenantOption,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.", metavar="DIR")],
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="The base's id for the card (default: its name here).", metavar="ID"),
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as it was uploaded, with a card: base, data digest and the gate's numbers of its job."""
    output = Output(as_json=as_json)
    if out.exists():
        raise CommandError("out_exists", f"--out {out}: exists already", ExitCode.REFUSED)
    with opened(data_dir, output) as store:
        version = store.resolve(tenant, ref)
        base = next((base for base in store.bases() if base.digest == version.base_digest), None)
        if base is not None:  # it was served here
            store.verify(version.digest, base)
        report = _report(store, data_dir, version)
        _write(store, version, out, base_model or (base.name if base else None), report)
    output.emit(folder=str(out), adapter=version.digest, has_report=report is not None)
    output.say(
        f"wrote {out}: {version.tenant}/{version.ref}, {'with' if report else 'without'} the report of its training"
    )


def _report(store: AdapterStore, data_dir: Path, version: AdapterVersion) -> dict[str, Any] | None:
    """report.json of the job that published this version, if there is one and it is still here."""
    from server.jobs.service import Onboarding
    from trainer.run_folder.folder import RunFolder

    jobs = Onboarding(data_dir, store.database, remote=store.remote).jobs.list(version.tenant)
    made = (job for job in jobs if (job.name, job.adapter_version) == (version.name, version.version))
    job = next((job for job in made if job.adapter_digest == version.digest), None)
    path = None if job is None else RunFolder(job.run_dir).report_json
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def _write(
    store: AdapterStore, version: AdapterVersion, out: Path, base: str | None, report: dict[str, Any] | None
) -> None:
    """Whole or not at all."""
    from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
    from trainer.report.card import card

    config = json.loads(store.config_of(version))
    base_name = base or str(config.get("base_model_name_or_path"))
    config["base_model_name_or_path"] = base_name
    text = card(version.name, base_name=base_name, base_digest=version.base_digest, config=config, report=report)
    scratch = out.with_name(f".{out.name}.part")
    scratch.mkdir(parents=True)
    try:
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(store.weights_of(version.digest), scratch / WEIGHTS_FILE)
        (scratch / CARD).write_text(text)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

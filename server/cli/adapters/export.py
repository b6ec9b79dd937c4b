"""`multilora adapter export`: a version as a folder that PEFT and hubs read, with its card; or as a GGUF file."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from server.cli.adapters.gguf import KINDS, VARIABLE, Kind, convert, find_converter, lora_config
from server.cli.adapters.merge import base_of, fetched, merged_into
from server.cli.adapters.versions import RefArgument
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, TenantOption
from server.cli.common.output import Output
from server.cli.common.store_access import opened

if TYPE_CHECKING:
    from adapters_store.base.description import BaseDescription
    from adapters_store.store import AdapterStore
    from adapters_store.versions.records import AdapterVersion

CARD = "README.md"
PEFT = "peft"
FORMS = (PEFT, *KINDS)


def export(
    ref: RefArgument,
    *,
    tenant: TenantOption,
    out: Annotated[
        Path, typer.Option("--out", help="The folder, or GGUF file, to write; it must not exist.", metavar="PATH")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft: as it was uploaded. gguf: merged into its base. gguf-lora: the adapter alone.",
            metavar="FORM",
        ),
    ] = PEFT,
    base: Annotated[
        str | None, typer.Option("--base", help="For GGUF: the adapter's base.", metavar="PATH_OR_ID")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", help="For GGUF: llama.cpp's sources.", metavar="DIR", envvar=VARIABLE),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="The base's id for the card (default: its name here).", metavar="ID"),
    ] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a folder with a card (base, data digest, the gate's numbers), or as a GGUF file."""
    output = Output(as_json=as_json)
    if form not in FORMS:
        raise CommandError("bad_field", f"--format must be one of {', '.join(FORMS)}, got {form!r}", ExitCode.REFUSED)
    if out.exists():
        raise CommandError("out_exists", f"--out {out}: exists already", ExitCode.REFUSED)
    if form == PEFT:
        with opened(data_dir, output) as store:
            _export_folder(store, store.resolve(tenant, ref), out, base_model, data_dir=data_dir, output=output)
        return
    if base is None:
        raise CommandError("bad_field", f"--base must be given with --format {form}", ExitCode.REFUSED)
    kind = KINDS[KINDS.index(form)]
    script = find_converter(kind, llama_cpp)
    with opened(data_dir, output) as store, fetched(store, tenant, ref) as (version, folder):
        _export_file(kind, script, base_of(store, version, base, output), folder, out, output=output)
    output.emit(file=str(out), adapter=version.digest, bytes=out.stat().st_size)
    output.say(f"wrote {out}: {version.tenant}/{version.ref}")


def _export_file(
    kind: Kind, script: Path, base: tuple[Path, str, BaseDescription], folder: Path, out: Path, *, output: Output
) -> None:
    path, _, description = base
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "gguf-lora":
        config = folder / CONFIG_FILE
        config.write_text(json.dumps(lora_config(json.loads(config.read_bytes()))))
        convert(script, folder, out, "--base", str(path), "--outtype", "f32")
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        merged = Path(scratch) / "merged"
        dtype = merged_into(merged, path, folder, description, output).dtype
        convert(script, merged, out, "--outtype", "f32" if dtype == "float32" else "auto")


def _export_folder(
    store: AdapterStore, version: AdapterVersion, out: Path, base_model: str | None, *, data_dir: Path, output: Output
) -> None:
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

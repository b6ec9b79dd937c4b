"""`multilora onboard`: trains, checks and publishes an adapter from a tenant's data, with or without a running server.

Decides what is shown; the job runner runs the job. If no server's worker runs, the command starts its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.common.base_path import BaseOption, find_base
from server.cli.common.database_url import DatabaseUrlOption
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.setting_options import JobsMemoryOption
from server.cli.common.store_access import opened
from server.cli.training.data import MapOption, readable
from server.jobs.limits import JobLimits
from server.settings import built

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore
    from server.jobs.served_base import ServedBase
    from server.jobs.service import Onboarding
    from server.jobs.store.job_request import StartingAdapter
    from server.jobs.store.records import Job

SpecOption = Annotated[
    Path | None, typer.Option("--spec", help="A training spec without base and data.", metavar="SPEC.yaml")
]
StartOption = Annotated[
    str | None,
    typer.Option("--from", help="The tenant's adapter to continue from: NAME, NAME@VERSION.", metavar="N[@V]"),
]
ValidationOption = Annotated[Path | None, typer.Option(help="Held-out data (default: a part of DATA).", dir_okay=False)]


def onboard(
    data: Annotated[Path, typer.Argument(help="Examples, as `multilora data check` takes them.", metavar="DATA")],
    *,
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="The adapter's tenant.", metavar="T")],
    name: Annotated[str, typer.Option("--name", "-n", help="The adapter's name.", metavar="N")],
    spec: SpecOption = None,
    validation: ValidationOption = None,
    columns: MapOption = "",
    start: StartOption = None,
    base: BaseOption = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    jobs_memory_mib: JobsMemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on a tenant's data, measure it, publish it and put it into service.

    Ctrl-C leaves the job as it is; the next worker, of a server or of another onboard, resumes it.
    """
    output = Output(as_json=as_json)
    with opened(data_dir, output, url=database_url) as store:
        from server.cli.training.follow import follow
        from server.jobs.service import Onboarding

        store.tenants.get(tenant)
        limits = built(JobLimits, {"jobs_memory_mib": jobs_memory_mib}, prefix="jobs_")
        onboarding = Onboarding(data_dir, store.database, limits, remote=store.remote)
        served = _base(onboarding, store, base, output)
        own_spec = _read_spec(spec)
        with readable(data, columns, output) as training:
            job = _create(
                onboarding,
                served,
                tenant=tenant,
                name=name,
                paths=(training, validation),
                spec=own_spec,
                start=_start(store, served, tenant, start),
            )
        output.say(f"job {job.id}")
        _show_result(follow(onboarding, job, output), output)


def _base(onboarding: Onboarding, store: AdapterStore, base: str | None, output: Output) -> ServedBase:
    """The base served last, or the one named."""
    from server.jobs.served_base import ServedBase

    known = onboarding.base
    if base is None:
        if known is None:
            message = "no base was served from this data directory yet; name one with --base PATH"
            raise CommandError("unknown_base", message, ExitCode.NOT_FOUND)
        return known
    with output.waiting(f"reading base {base}"):
        from server.cli.common.base_path import describe

        folder, own_name = find_base(base, output)
        description = describe(folder, own_name)
    if known is not None and known.digest == description.digest:
        return known
    store.remember_base(description)
    served = ServedBase(path=folder, name=own_name, digest=description.digest)
    onboarding.jobs.bases.remember(served)
    return served


def _start(store: AdapterStore, served: ServedBase, tenant: str, ref: str | None) -> StartingAdapter | None:
    from server.jobs.service import starting_adapter

    if ref is None:
        return None
    version = store.resolve(tenant, ref)
    if version.base_digest != served.digest:
        message = f"--from {ref}: was made for another base than {served.name!r}"
        raise CommandError("base_mismatch", message, ExitCode.CONFLICT)
    return starting_adapter(store, version)


def _create(
    onboarding: Onboarding,
    served: ServedBase,
    *,
    tenant: str,
    name: str,
    paths: tuple[Path, Path | None],
    spec: Mapping[str, Any],
    start: StartingAdapter | None,
) -> Job:
    """The uploaded files are temporary: the job keeps its own copy."""
    from server.jobs.store.job_request import JobRequest

    ids: list[str | None] = []
    try:
        for path in paths:
            file = path and onboarding.files.add(tenant=tenant, filename=path.name, purpose="fine-tune", source=path)
            ids.append(file.id if file else None)
        assert ids[0] is not None
        request = JobRequest(model=served.name, training_file=ids[0], validation_file=ids[1], suffix=name, spec=spec)
        return onboarding.create(tenant, request, start)
    finally:
        for file_id in filter(None, ids):
            onboarding.files.delete(tenant, file_id)


def _read_spec(path: Path | None) -> Mapping[str, Any]:
    import yaml

    from adapters_store.parsing.strict_yaml import load_yaml

    if path is None:
        return {}
    try:
        body = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError("bad_spec", f"--spec {path}: {' '.join(str(error).split())}", ExitCode.REFUSED) from error
    if not isinstance(body, dict):
        raise CommandError("bad_spec", f"--spec {path}: must be an object, got {body!r:.80}", ExitCode.REFUSED)
    return body


def _show_result(job: Job, output: Output) -> None:
    """Raises CommandError for a job that did not succeed."""
    from server.jobs.store.objects import job_object
    from trainer.run_folder.folder import RunFolder

    if job.failure is not None:
        exit_code = ExitCode.REFUSED if job.failure.code == "gate_blocked" else ExitCode.FAILED
        raise CommandError(job.failure.code, f"{job.id}: {job.failure.message}", exit_code)
    if job.model_id is None:
        raise CommandError("job_not_finished", f"{job.id}: the job is {job.status}", ExitCode.FAILED)
    output.emit(**job_object(job))
    output.say(f"in service: {job.name}@{job.adapter_version} of {job.tenant} ({job.model_id})", style="bold green")
    report = RunFolder(job.run_dir).report_html
    if report.is_file():
        output.say(f"report      {report}", style="dim")

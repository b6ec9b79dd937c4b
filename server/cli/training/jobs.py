"""`multilora jobs`: onboarding jobs, with or without a running server; and a job worker without a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.common.database_url import DatabaseUrlOption, remote_from_environment
from server.cli.common.database_url import database_url as checked
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption
from server.cli.common.output import Output
from server.cli.common.setting_options import WORKER_SETTINGS, offering
from server.cli.common.store_access import opened
from server.cli.common.texts import when
from server.jobs.limits import JobLimits
from server.jobs.settings import JobSettings
from server.settings import built

if TYPE_CHECKING:
    from server.jobs.service import Onboarding
    from server.jobs.store.job_store import JobStore
    from server.jobs.store.records import Job

app = typer.Typer(help="List, show, cancel, pause and resume onboarding jobs; override the gate.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(help="The job's id.", metavar="ID")]


@app.command("list")
def list_jobs(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's jobs.", metavar="T")] = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from server.jobs.store.objects import job_object

    output = Output(as_json=as_json)
    with _onboarding(data_dir, database_url, output) as onboarding:
        jobs = onboarding.jobs.list(tenant)
    output.emit(data=[job_object(job) for job in jobs])
    rows = [(job.id, job.tenant, job.name, job.status.value, _progress(job), when(job.created_at)) for job in jobs]
    if rows:
        output.table(("job", "tenant", "adapter", "status", "step", "created"), rows)
    else:
        output.say("no jobs yet: multilora onboard DATA.jsonl --tenant T --name N")


@app.command()
def show(
    job_id: IdArgument,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a job and its messages."""
    output = Output(as_json=as_json)
    with _onboarding(data_dir, database_url, output) as onboarding:
        job = onboarding.jobs.get(job_id)
        _show_state(job, output)
        for event in reversed(onboarding.jobs.events(job)):
            if event.type == "message":
                output.say(f"{when(event.created_at)}  {event.message}")


def _changing(change: Callable[[JobStore, Job], Job]) -> Callable[..., None]:
    """A command that changes a job and shows it."""

    def command(
        job_id: IdArgument,
        data_dir: DataDirOption = DEFAULT_DATA_DIR,
        database_url: DatabaseUrlOption = None,
        as_json: JsonOption = False,
    ) -> None:
        _change(job_id, change, data_dir, database_url, as_json=as_json)

    return command


app.command("cancel", help="Cancel a job and drop what it trained.")(_changing(lambda jobs, job: jobs.cancel(job)))
app.command("pause", help="Pause a job at a checkpoint.")(_changing(lambda jobs, job: jobs.pause(job)))
app.command("resume", help="Queue a paused job again; it resumes from its checkpoint.")(
    _changing(lambda jobs, job: jobs.resume(job))
)


@app.command()
def override(
    job_id: IdArgument,
    reason: Annotated[str, typer.Option("--reason", help="The reason, which is stored with the job.", metavar="TEXT")],
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put an adapter into service that the gate blocked. A worker resumes the job."""
    by = f"cli:uid{os.getuid()}"
    _change(job_id, lambda jobs, job: jobs.override(job, by=by, reason=reason), data_dir, database_url, as_json=as_json)


@app.command()
@offering(WORKER_SETTINGS, cut="jobs-")
def worker(
    *,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url: DatabaseUrlOption = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per training.", min=1)] = None,
    as_json: JsonOption = False,
    **given: Any,
) -> None:
    """Run jobs until SIGTERM; `serve` does this by itself. Only one worker at a time runs on a database.

    With --json one line says that the worker is ready; `jobs list` shows the jobs.
    """
    from server.jobs.worker.options import WorkerSettings
    from server.jobs.worker.supervisor import default_threads, idle_threads
    from server.jobs.worker.worker import work

    try:
        limits, jobs = built(JobLimits, given, prefix="jobs_"), built(JobSettings, given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    max_running = limits.max_running
    settings = WorkerSettings(
        data_dir=data_dir,
        database_url=checked(database_url),
        remote=remote_from_environment(),
        max_running=max_running,
        memory_bytes=limits.memory_bytes,
        threads=threads or default_threads(max_running),
        idle_threads=idle_threads(max_running) if threads is None else None,
        jobs=jobs,
    )
    Output(as_json=as_json).emit(event="working", data_dir=str(data_dir), max_running=max_running, pid=os.getpid())
    work(settings)


@contextmanager
def _onboarding(data_dir: Path, url: str | None, output: Output) -> Iterator[Onboarding]:
    with opened(data_dir, output, url=url) as store:
        from server.jobs.service import Onboarding

        yield Onboarding(data_dir, store.database, remote=store.remote)


def _change(
    job_id: str, change: Callable[[JobStore, Job], Job], data_dir: Path, url: str | None, *, as_json: bool
) -> None:
    output = Output(as_json=as_json)
    with _onboarding(data_dir, url, output) as onboarding:
        _show_state(change(onboarding.jobs, onboarding.jobs.get(job_id)), output)


def _show_state(job: Job, output: Output) -> None:
    from server.jobs.store.objects import job_object

    output.emit(**job_object(job))
    wanted = "" if job.wanted == "run" or job.status.has_ended else f", {job.wanted} asked for"
    output.say(f"{job.id}  {job.tenant}/{job.name}  {job.status.value}{wanted}")
    if job.failure is not None:
        output.say(f"{job.failure.code}: {job.failure.message}")
    if job.model_id is not None:
        output.say(f"model  {job.model_id}")


def _progress(job: Job) -> str:
    step, count = job.progress.get("step"), job.progress.get("num_steps")
    return "" if step is None else f"{step}/{count}"

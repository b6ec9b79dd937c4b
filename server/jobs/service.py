"""Onboarding as the API and the command line use it: files and jobs of one data directory, checked before kept.

Decides what a new job must be; knows the tenant by name only. Works with or without a running worker or server.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.errors import Conflict, NotFound
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.remote.remote import Remote, open_bucket
from adapters_store.remote.settings import RemoteSettings
from adapters_store.storage.blobs import disk_full_is_an_answer
from adapters_store.storage.database import Database
from adapters_store.storage.names import check_name
from server.jobs.limits import BatchLimits, JobLimits, JobRefused
from server.jobs.served_base import ServedBase
from server.jobs.store import job_rows
from server.jobs.store.batch_store import BatchStore
from server.jobs.store.data_files import FileStore
from server.jobs.store.job_request import JobRequest, StartingAdapter, build_spec
from server.jobs.store.job_store import JobStore, NewJob
from server.jobs.store.readable_data import make_readable
from server.jobs.store.records import INITIAL_ADAPTER, MIX_FILE, TRAINING_FILE, VALIDATION_FILE, DataFile, Job
from trainer.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore
    from adapters_store.versions.records import AdapterVersion

MAX_SUFFIX_CHARS = 64


class Onboarding:
    """files, jobs, batches: the three stores. serves: the digest of the base that this server serves; None without a
    server."""

    def __init__(
        self,
        data_dir: Path,
        database: Database,
        limits: JobLimits | None = None,
        *,
        batch_limits: BatchLimits | None = None,
        serves: str | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.data_dir = data_dir = data_dir.resolve()  # specs hold paths, and other processes read them
        self._serves = serves
        self.limits = limits = limits or JobLimits()
        self.remote = remote
        self.files = FileStore(database, data_dir, limits, remote=remote)
        self.jobs = JobStore(database, data_dir, limits)
        self.batch_limits = batch_limits or BatchLimits()
        self.batches = BatchStore(database, self.batch_limits)
        self.database = database

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        database_url: str | None = None,
        limits: JobLimits | None = None,
        remote: RemoteSettings | None = None,
    ) -> Onboarding:
        """The data directory must exist: the adapter store makes it. remote: the object store of the files."""
        bucket = open_bucket(remote, data_dir)
        database = Database(data_dir, database_url, bucket=bucket)
        at = None if remote is None or bucket is None else Remote(remote, bucket, database, data_dir)
        return cls(data_dir, database, limits, remote=at)

    def close(self) -> None:
        """Close the database connections."""
        self.database.close()

    @property
    def database_url(self) -> str:
        """The database's URL, password included: for a worker's environment, never for display."""
        return self.database.engine.url.render_as_string(hide_password=False)

    @property
    def base(self) -> ServedBase | None:
        """What jobs are created for: the base that this server serves, or the one served last; None: it is unknown."""
        return self.jobs.bases.last() if self._serves is None else self.jobs.bases.find(self._serves)

    def create(self, tenant: str, request: JobRequest, start: StartingAdapter | None = None) -> Job:
        """Check a job and queue it. Nothing of a refused job is kept. start: the version it begins with, of this base.

        Raises:
            JobRefused: bad data (the line and its code), a bad field, unsupported_method, rank_too_large.
            NotFound: model_not_found, file_not_found. Conflict: name_is_base. JobLimit: too_many_jobs and its kin.
            StoreError: disk_full.
        """
        base = self._base_named(request.model if start is None else None)
        self.jobs.check_limits(tenant)
        job_id = self.jobs.new_id()
        name = self._name(request.suffix, job_id, base)
        run_dir = self.jobs.runs / job_id
        files = self._files(tenant, request)
        reports: dict[str, str | None] = {}
        try:
            with disk_full_is_an_answer():
                run_dir.mkdir(mode=0o700, parents=True)
                if start is not None:
                    _copy(start, run_dir / INITIAL_ADAPTER)
            named = {"validation": VALIDATION_FILE in files, "mix": MIX_FILE in files}
            spec = build_spec(request, base, self.limits, **named, start=start)
            for each, (file, param) in files.items():
                self.files.link(file, run_dir / each, param=param)
                with disk_full_is_an_answer():
                    reports[param] = make_readable(run_dir / each, param, pairs=spec.objective == "dpo")
            body = replace(request, suffix=name).to_mapping()
            new = NewJob(tenant=tenant, name=name, request=body, spec=spec.to_mapping(), base_digest=base.digest)
            job = self.jobs.add(job_id, new)
        except BaseException:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        for param, text in reports.items():
            if text is not None:
                self.jobs.note(job, f"converted:{param}", f"{param}: {text}")
        return job

    def sweep(self, grace_s: float = 3600) -> None:
        """Remove what killed processes and deleted tenants left: blobs and run folders without a row, and the
        checkpoints of ended jobs. Raises StoreError (wrong_store) if the rows are not proved to be this directory's."""
        self.files.sweep(grace_s)
        with self.database.proven() as connection:
            known = {job.id: job for job in job_rows.list_jobs(connection, None, None)}
        for folder in self.jobs.runs.glob("ftjob-*"):
            job = known.get(folder.name)
            if job is None and self.database.pair.is_left_over(folder, grace_s):
                shutil.rmtree(folder, ignore_errors=True)
            elif job is not None and job.status.has_ended:
                RunFolder(folder).drop_checkpoints()

    def _base_named(self, model: str | None) -> ServedBase:
        """model None: the one that is served."""
        base = self.base
        if base is None or model not in (base.name, None):
            served = "" if base is None else f"; jobs run on {base.name!r}, which is served here"
            message = f"The model {model!r} does not exist or cannot be fine-tuned{served}."
            raise NotFound("model_not_found", message, param="model")
        return base

    def _name(self, suffix: str | None, job_id: str, base: ServedBase) -> str:
        """The adapter's name: the suffix, or one made from the job's id."""
        name = suffix if suffix is not None else job_id.replace("ftjob-", "ft-")[:15]
        if len(name) > MAX_SUFFIX_CHARS:
            message = f"suffix: must have at most {MAX_SUFFIX_CHARS} characters, got {len(name)}"
            raise JobRefused("invalid_value", message, param="suffix")
        check_name("suffix", name)
        if ":" in name:
            message = f"suffix: {name!r} must not contain ':', the separator in model ids"
            raise JobRefused("bad_name", message, param="suffix")
        if name == base.name:
            raise Conflict("name_is_base", f"suffix: {name!r} is the name of the base model", param="suffix")
        return name

    def _files(self, tenant: str, request: JobRequest) -> dict[str, tuple[DataFile, str]]:
        """By its name in the run's folder: the tenant's file, and the request field that named it."""
        requested = {
            TRAINING_FILE: (request.training_file, "training_file"),
            VALIDATION_FILE: (request.validation_file, "validation_file"),
            MIX_FILE: (request.mix_file, "multilora.mix_file"),
        }
        found = {
            name: (self.files.get(tenant, file_id, param=param), param)
            for name, (file_id, param) in requested.items()
            if file_id is not None
        }
        training = found[TRAINING_FILE][0]
        for name, (file, param) in found.items():
            if name != TRAINING_FILE and file.digest == training.digest:
                raise JobRefused("duplicate_file", f"{param}: {file.id} has the training file's bytes", param=param)
        return found


def starting_adapter(store: AdapterStore, version: AdapterVersion) -> StartingAdapter:
    """The version as a job continues from it, its bytes compared with its digest. Raises BlobDamaged, NotFound."""
    base = next((base for base in store.bases() if base.digest == version.base_digest), None)
    if base is None:
        raise NotFound(
            "unknown_base", f"{version.ref}: its base was not served from this data directory", param="model"
        )
    store.verify(version.digest, base)
    weights = store.weights_of(version.digest)
    return StartingAdapter(ref=version.ref, config=store.config_of(version), weights=weights)


def _copy(start: StartingAdapter, folder: Path) -> None:
    """Into the run's folder: the version may be deleted while the job waits."""
    folder.mkdir(mode=0o700)
    (folder / CONFIG_FILE).write_bytes(start.config)
    try:
        (folder / WEIGHTS_FILE).hardlink_to(start.weights)
    except OSError:  # another file system
        shutil.copyfile(start.weights, folder / WEIGHTS_FILE)

"""Every setting of `multilora serve`, each defined once. Names, limits and help; knows nothing of how they are given.

The sections are the settings of the parts that read them: EngineSettings (with SchedulerSettings and MemoryBudget),
ApiSettings, JobLimits and BatchLimits. Imports nothing heavy: `--help` and `--print-config` read this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters_store.remote.settings import CACHE_MIB, GRACE_S, RemoteSettings
from adapters_store.storage.availability import DEFAULT_GRACE_S
from server.api.settings import ApiSettings
from server.cli.common.base_path import BASE_FORMS
from server.cli.common.database_url import DATABASE_URL_HELP
from server.cli.common.options import DATA_DIR_HELP, DEFAULT_DATA_DIR, HOST_HELP, PORT_HELP
from server.cli.serve.http_server import DRAIN_S
from server.engine.startup.settings import EngineSettings
from server.jobs.limits import BatchLimits, JobLimits
from server.jobs.settings import RAY, JobSettings
from server.settings import Setting, check_settings, section, setting, settings_of

BLOB_URL_HELP = (
    "Keep adapters and training files in an object store: s3://BUCKET/PREFIX, gs:// or az://. --data-dir is then a "
    "cache. Credentials come from the environment. Every server of one database needs the same."
)
BLOB_CACHE_HELP = "With --blob-url: how much of the disk the cache may take."
BLOB_GRACE_HELP = "With --blob-url: how long a blob that no adapter and no file names stays in the object store."
_MODEL, _HTTP, _STORE, _LOGS = "Model", "HTTP", "Data", "Logs"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """One start of the server. None: from the base or from the machine."""

    base: str | Path | None = setting(None, f"The base: {BASE_FORMS}. Required.", metavar="PATH_OR_ID", group=_MODEL)
    served_name: str | None = setting(
        None, "The base's id in the API (default: the last part of --base).", metavar="NAME", group=_MODEL
    )
    generation_config: str = setting(
        "neutral",
        "Sampling defaults: auto (the base's generation_config.json), a folder with one, or neutral.",
        metavar="auto|neutral|DIR",
        group=_MODEL,
    )
    data_dir: Path = setting(DEFAULT_DATA_DIR, DATA_DIR_HELP, group=_STORE)
    database_url: str | None = setting(None, DATABASE_URL_HELP, metavar="URL", secret=True, group=_STORE)
    database_grace_s: float = setting(
        DEFAULT_GRACE_S,
        "If the database does not answer, known keys and adapters are served for this time; then 503.",
        at_least=0,
        at_most=86_400,
        group=_STORE,
    )
    blob_url: str | None = setting(None, BLOB_URL_HELP, metavar="URL", group=_STORE)
    blob_cache_mib: int = setting(CACHE_MIB, BLOB_CACHE_HELP, at_least=1, group=_STORE)
    blob_grace_s: float = setting(GRACE_S, BLOB_GRACE_HELP, at_least=0, at_most=31_536_000, group=_STORE)
    host: str = setting("127.0.0.1", HOST_HELP, metavar="ADDRESS", group=_HTTP)
    port: int = setting(8000, PORT_HELP, at_least=0, at_most=65_535, group=_HTTP)
    drain_s: float = setting(
        DRAIN_S, "After SIGTERM, running requests may finish for this time.", at_least=0, at_most=3600, group=_HTTP
    )
    log_format: str = setting("text", "Format of the log on stderr.", choices=("text", "json"), group=_LOGS)
    otlp_endpoint: str | None = setting(
        None,
        "Send traces to this OTLP/HTTP collector.",
        metavar="URL",
        environment=("OTEL_EXPORTER_OTLP_ENDPOINT",),
        group=_LOGS,
    )
    engine: EngineSettings = section(_MODEL)
    api: ApiSettings = section("API")
    jobs: JobLimits = section("Jobs", prefix="jobs_")
    job_execution: JobSettings = section("Jobs")
    batches: BatchLimits = section("Batches", prefix="batch_")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.jobs.max_nodes > 1 and self.job_execution.executor != RAY:
            raise ValueError(f"jobs_max_nodes {self.jobs.max_nodes} needs jobs_executor ray")

    @property
    def remote(self) -> RemoteSettings | None:
        """The object store that holds the blobs."""
        if not self.blob_url:
            return None
        return RemoteSettings(url=self.blob_url, cache_mib=self.blob_cache_mib, grace_s=self.blob_grace_s)


SERVE_SETTINGS: dict[str, Setting] = {each.name: each for each in settings_of(ServeSettings)}

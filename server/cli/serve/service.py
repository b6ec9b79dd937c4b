"""One running server without a socket: traces, store, engine, app and its threads, opened in this order. Imports torch.

`multilora serve` puts its HTTP server around it, Ray Serve its own; both get the same app.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace

from fastapi import FastAPI

from adapters_store.store import AdapterStore
from lora_kernels.process import share_arenas
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.api.telemetry.tracing import OtlpTracing, TracingUnavailable
from server.cli.common.admin_key import AdminKey, admin_key
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.output import Output
from server.cli.common.store_access import opened
from server.cli.serve.engine_start import remember_base, running_engine, show_memory
from server.cli.serve.settings import ServeSettings
from server.cli.serve.store_start import prepare, where_the_disk_allows
from server.engine.startup.build import EngineParts
from server.engine.startup.generation_config import SamplingDefaults, sampling_defaults


@dataclass(frozen=True)
class Service:
    """What runs: the app, and the parts behind it. The HTTP server around it drains it first."""

    app: FastAPI
    store: AdapterStore
    parts: EngineParts


@contextmanager
def running_service(settings: ServeSettings, output: Output, api: ApiSettings | None = None) -> Iterator[Service]:
    """api: used instead of the settings' own. Raises USER_ERRORS of `failures`."""
    share_arenas()
    defaults = sampling_defaults(settings.generation_config, settings.engine.base)
    with (
        traced(settings.otlp_endpoint) as tracing,
        opened(
            settings.data_dir,
            output,
            url=settings.database_url,
            grace_s=settings.database_grace_s,
            remote=settings.remote,
        ) as store,
    ):
        key = admin_key(settings.data_dir)
        _show_admin_key(key, output)
        prepare(store, output)
        with (
            running_engine(settings.engine, store, output) as parts,
            store.serving(parts.base.description.digest, parts.worker.served_name),
        ):
            where_the_disk_allows(lambda: remember_base(settings.engine, parts, store), output)
            show_memory(parts, output)
            _show_defaults(defaults, output)
            own = replace(api or settings.api, admin_keys=key.values, sampling_defaults=defaults)
            app = create_app(
                engine=parts.worker,
                store=store,
                settings=own,
                tracing=tracing,
                job_limits=settings.jobs,
                batch_limits=settings.batches,
            )
            with background(app, settings.job_execution):
                yield Service(app, store, parts)


def traced(endpoint: str | None) -> AbstractContextManager[OtlpTracing | None]:
    """Traces for the length of a block, if there is an endpoint; the end sends the rest.

    Raises CommandError (tracing_unavailable).
    """
    if endpoint is None:
        return nullcontext()
    try:
        return closing(OtlpTracing(endpoint))
    except TracingUnavailable as error:
        raise CommandError("tracing_unavailable", str(error), ExitCode.USAGE) from error


def _show_admin_key(key: AdminKey, output: Output) -> None:
    """Show the key only if it was created now."""
    if key.is_new:
        output.event("admin_key", admin_key=key.value, path=str(key.path))
        output.say(f"admin key  {key.value}")
        output.say(f"kept in {key.path}; shown only now", style="dim")


def _show_defaults(defaults: SamplingDefaults, output: Output) -> None:
    if defaults.given:
        output.event("sampling_defaults", **defaults.given)
        output.say(f"sampling defaults: {', '.join(f'{name} {value}' for name, value in defaults.given.items())}")

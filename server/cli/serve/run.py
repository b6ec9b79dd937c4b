"""One run of the server: store, engine, API, socket; opened in this order and closed in the other. Imports torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastapi import FastAPI

from lora_kernels.process import share_arenas
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.api.telemetry.tracing import OtlpTracing, Tracing, TracingUnavailable
from server.cli.common.admin_key import AdminKey, admin_key
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.listening import url_of
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.cli.common.store_access import opened
from server.cli.common.texts import curl_line
from server.cli.serve.engine_start import remember_base, running_engine, show_memory
from server.cli.serve.http_server import DRAIN_S, HttpServer
from server.cli.serve.open_files import ConnectionLimits, limits_within, raise_soft_limit
from server.cli.serve.settings import ServeSettings
from server.cli.serve.store_start import prepare, where_the_disk_allows
from server.engine.startup.build import EngineParts
from server.engine.startup.generation_config import SamplingDefaults, sampling_defaults


def run(settings: ServeSettings, listener: socket.socket, output: Output, signals: StopSignals) -> None:
    """Serve until a signal. Raises USER_ERRORS of `failures`."""
    share_arenas()
    connections = connection_limits(settings, output)
    defaults = sampling_defaults(settings.generation_config, settings.engine.base)
    with (
        traced(settings.otlp_endpoint) as tracing,
        opened(settings.data_dir, output, url=settings.database_url, grace_s=settings.database_grace_s) as store,
    ):
        key = admin_key(settings.data_dir)
        _show_admin_key(key, output)
        prepare(store, output)
        with running_engine(settings.engine, store, output) as parts:
            where_the_disk_allows(lambda: remember_base(settings.engine, parts, store), output)
            show_memory(parts, output)
            api = api_settings(settings, key, defaults, connections)
            _show_defaults(defaults, output)
            app = create_app(engine=parts.worker, store=store, settings=api, tracing=tracing, job_limits=settings.jobs)
            with http_server(app, listener, signals, drain_s=settings.drain_s) as server:
                _show_ready(settings, parts, url_of(listener), output)
                signals.wait(while_true=lambda: server.is_alive)
                output.event("stopping")
                output.say("stopping; running requests may finish (a second signal aborts them)")


@contextmanager
def traced(endpoint: str | None) -> Iterator[Tracing | None]:
    """Traces for the length of a block, if there is an endpoint; the end sends the rest.

    Raises CommandError (tracing_unavailable).
    """
    if endpoint is None:
        yield None
        return
    try:
        tracing = OtlpTracing(endpoint)
    except TracingUnavailable as error:
        raise CommandError("tracing_unavailable", str(error), ExitCode.USAGE) from error
    try:
        yield tracing
    finally:
        tracing.close()


@contextmanager
def http_server(
    app: FastAPI, listener: socket.socket, signals: StopSignals, *, drain_s: float = DRAIN_S
) -> Iterator[HttpServer]:
    """Serve the app; stop it in order at the end. Raises CommandError (server_stopped) if it ended by itself."""
    server = HttpServer(app, listener, drain_s=drain_s)
    with background(app):
        server.start()
        try:
            yield server
            if not server.is_alive:
                raise CommandError("server_stopped", "the HTTP server ended by itself; see the log")
        finally:
            signals.defer()
            server.stop(signals)


def connection_limits(settings: ServeSettings, output: Output) -> ConnectionLimits:
    """The limits asked for, or the largest that the system's limit of open files allows, with a warning.

    Raises CommandError (too_few_files).
    """
    asked = ConnectionLimits(settings.api.max_connections, settings.api.max_connections_per_address)
    open_files = raise_soft_limit()
    limits = limits_within(asked, open_files)
    if limits != asked:
        output.event("connections", max_connections=limits.total, per_address=limits.each, open_files=open_files)
        output.say(
            f"{limits.total} connections, not {asked.total}: {open_files} files may be open (ulimit -n)", style="yellow"
        )
    return limits


def api_settings(
    settings: ServeSettings, key: AdminKey, defaults: SamplingDefaults, connections: ConnectionLimits
) -> ApiSettings:
    """The API's settings, with what is known only now."""
    return replace(
        settings.api,
        admin_keys=key.values,
        sampling_defaults=defaults,
        max_connections=connections.total,
        max_connections_per_address=connections.each,
    )


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


def _show_ready(settings: ServeSettings, parts: EngineParts, url: str, output: Output) -> None:
    worker = parts.worker
    output.event("ready", url=url, base=worker.served_name, auth=settings.api.auth, pid=os.getpid())
    output.say(f"ready on {url}", style="bold green")
    is_open = settings.api.auth == "off"
    if is_open:
        output.say(
            "--auth off: any client that reaches this address can send requests for every tenant", style="yellow"
        )
    else:
        output.say(f"multilora tenant create acme --data-dir {settings.data_dir}")
    output.say(f"multilora adapter push DIR --tenant acme --name NAME --data-dir {settings.data_dir}")
    chat = worker.tokenizer.has_chat_template
    key = None if is_open else "KEY"
    output.say(curl_line(url, key=key, model=worker.served_name, prompt="Once upon a time", chat=chat))

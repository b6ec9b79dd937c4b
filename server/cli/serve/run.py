"""One run of the server: a service and a socket around it. Imports torch."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastapi import FastAPI

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.listening import ConnectionLimits, limits_within, raise_soft_limit, url_of
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.cli.common.texts import curl_line
from server.cli.serve.http_server import DRAIN_S, HttpServer
from server.cli.serve.service import running_service
from server.cli.serve.settings import ServeSettings
from server.engine.startup.build import EngineParts


def run(settings: ServeSettings, listener: socket.socket, output: Output, signals: StopSignals) -> None:
    """Serve until a signal, or until the device fails. Raises USER_ERRORS of `failures`."""
    limits = connection_limits(settings, output)
    api = replace(settings.api, max_connections=limits.total, max_connections_per_address=limits.each)
    with (
        running_service(settings, output, api) as service,
        http_server(service.app, listener, signals, drain_s=settings.drain_s) as server,
    ):
        _show_ready(settings, service.parts, url_of(listener), output)
        worker = service.parts.worker
        signals.wait(while_true=lambda: server.is_alive and worker.device_error is None)
        _require_device(service.parts)
        output.event("stopping")
        output.say("stopping; running requests may finish (a second signal aborts them)")


def _require_device(parts: EngineParts) -> None:
    """Raises CommandError (device_lost) if the device has failed: a supervisor then starts a new process."""
    reason = parts.worker.device_error
    if reason is None:
        return
    atexit.register(_end_at_once)  # CUDA's own destructors may abort on a failed device, with another exit code
    message = f"{parts.plan.device} has failed and answers no call of this process any more: {reason}"
    raise CommandError("device_lost", message, ExitCode.DEVICE_LOST)


def _end_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(ExitCode.DEVICE_LOST)


@contextmanager
def http_server(
    app: FastAPI, listener: socket.socket, signals: StopSignals, *, drain_s: float = DRAIN_S
) -> Iterator[HttpServer]:
    """Serve the app; stop it in order at the end. Raises CommandError (server_stopped) if it ended by itself."""
    server = HttpServer(app, listener, drain_s=drain_s)
    try:
        server.start()
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


def _show_ready(settings: ServeSettings, parts: EngineParts, url: str, output: Output) -> None:
    worker = parts.worker
    output.event("ready", url=url, base=worker.served_name, auth=settings.api.auth, pid=os.getpid())
    output.say(f"ready on {url}", style="bold green")
    is_open = settings.api.auth == "off"
    urls = {"MULTILORA_DATABASE_URL": settings.database_url, "MULTILORA_BLOB_URL": settings.blob_url}
    if needed := [name for name, url in urls.items() if url]:
        output.say(f"commands need the server's own {' and '.join(needed)}")
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

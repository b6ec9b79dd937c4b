"""The socket and the HTTP server's thread. Decides when the port is taken and how the server stops; knows no route."""

from __future__ import annotations

import errno
import socket
import threading
import time
from typing import TYPE_CHECKING

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.stop_signals import StopSignals

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.api.edge.draining import Draining

DRAIN_S = 30.0
_LAST_WORDS_S = 2  # for those who are told at the deadline, and for what does not listen to being told
_POLL_S = 0.01


def bound(host: str, port: int) -> socket.socket:
    """A socket on that address that does not accept yet: whoever asks too early is refused, not left waiting.

    Raises CommandError: port_in_use, bad_host. OSError for the system's other reasons.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError("bad_host", f"--host {host}: {error.strerror}", ExitCode.USAGE) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise CommandError("bad_host", f"--host {host}: not an address of this machine", ExitCode.USAGE) from error
        raise


def port_in_use(host: str, port: int) -> CommandError:
    message = f"{host}:{port} is in use; stop what listens there, or give another --port"
    return CommandError("port_in_use", message, ExitCode.CONFLICT)


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """An app served on a thread, so that the main thread keeps the signals. drain_s: see `stop`."""

    def __init__(self, app: FastAPI, listener: socket.socket, *, drain_s: float = DRAIN_S) -> None:
        from server.api.edge.connections.server import ListenSettings, build_server

        self._listener = listener
        self._drain_s = drain_s
        context = app.state.context
        self._draining: Draining = context.draining
        self._server = build_server(app, context.settings, ListenSettings(grace_s=_LAST_WORDS_S))
        self._thread = threading.Thread(target=self._run, name="http")
        self._error: Exception | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Returns once clients are accepted. Raises CommandError (port_in_use), OSError."""
        host, port = self._listener.getsockname()[:2]
        self._thread.start()
        while self.is_alive and not self._server.started:
            time.sleep(_POLL_S)
        if self._server.started:
            return
        if isinstance(self._error, OSError) and self._error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from self._error  # another server bound it while we loaded
        raise self._error or CommandError("server_stopped", "the HTTP server ended before it began")

    def stop(self, signals: StopSignals) -> None:
        """Turn false at /ready and let nobody in, but let answers under way come to their end, for drain_s at most;
        then tell those left, and end the thread. At once when asked twice."""
        self._draining.begin()
        self._wait_until_empty(self._drain_s, signals)
        if signals.count < 2:
            self._draining.cut_off()
            self._wait_until_empty(_LAST_WORDS_S, signals)
        self._server.should_exit = True
        while self.is_alive:
            self._server.force_exit = signals.count > 1
            self._thread.join(_POLL_S)

    def _wait_until_empty(self, limit_s: float, signals: StopSignals) -> None:
        deadline_s = time.monotonic() + limit_s
        while self.is_alive and self._draining.num_inside and signals.count < 2 and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except OSError as error:
            self._error = error

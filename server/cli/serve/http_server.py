"""The HTTP server's thread. Decides how the server stops; knows no route."""

from __future__ import annotations

import errno
import socket
import threading
import time
from typing import TYPE_CHECKING

from server.cli.common.failures import CommandError
from server.cli.common.listening import port_in_use
from server.cli.common.stop_signals import StopSignals

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.api.edge.draining import Draining

DRAIN_S = 30.0
_ABORT_GRACE_S = 2  # for streams to send their error at the deadline, and for connections that ignore the stop
_POLL_S = 0.01


class HttpServer:
    """An app served on a thread, so that the main thread keeps the signals. drain_s: see `stop`."""

    def __init__(self, app: FastAPI, listener: socket.socket, *, drain_s: float = DRAIN_S) -> None:
        from server.api.edge.connections.server import ListenSettings, build_server

        self._listener = listener
        self._drain_s = drain_s
        context = app.state.context
        self._draining: Draining = context.draining
        self._server = build_server(app, context.settings, ListenSettings(grace_s=_ABORT_GRACE_S))
        self._thread = threading.Thread(target=self._run, name="http")
        self._error: Exception | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Returns when clients are accepted. Raises CommandError (port_in_use), OSError."""
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
        """Answer 503 at /ready and to new requests, and let running requests finish for at most drain_s.

        The rest then get an error, and the thread ends. A second signal ends it at once.
        """
        self._draining.begin()
        self._wait_until_empty(self._drain_s, signals)
        if signals.count < 2:
            self._draining.cut_off()
            self._wait_until_empty(_ABORT_GRACE_S, signals)
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

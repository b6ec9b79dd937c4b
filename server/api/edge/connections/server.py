"""Runs an app on a socket. Decides uvicorn's settings; knows nothing of what the app does."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI

from server.api.edge.connections.acceptor import Acceptor
from server.api.edge.connections.connection import protocol_with
from server.api.edge.connections.http_messages import whole_response
from server.api.settings import ApiSettings
from server.api.wire.errors import ApiError

Loop = Literal["asyncio", "uvloop"]


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Address and timeouts of a listener. grace_s: time for running answers to finish after a stop signal.

    loop: the event loop. It is named here, because uvicorn's own default depends on what happens to be installed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: int = 30
    loop: Loop = "asyncio"


class BoundedServer(uvicorn.Server):
    """uvicorn's server, with an acceptor of our own between its sockets and its connections.

    Connections beyond `max_connections` are answered 503 as they are taken, and hold no descriptor.
    """

    def __init__(self, config: uvicorn.Config, max_connections: int) -> None:
        super().__init__(config)
        message = f"the server has its maximum of {max_connections} open connections"
        self._full = ApiError(503, "too_many_connections", message, retry_after_s=1.0)
        self._max_connections = max_connections
        self._acceptor: Acceptor | None = None
        self._listeners: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises OSError if the port is in use."""
        config, state = self.config, self.server_state
        self._listeners = [config.bind_socket()] if sockets is None else sockets
        app_state: dict[str, Any] = {}
        self._acceptor = Acceptor(
            lambda: config.http_protocol_class(config=config, server_state=state, app_state=app_state),  # type: ignore[call-arg]
            max_open=self._max_connections,
            open_now=state.connections,
            refusal=lambda: whole_response(self._full),
        )
        self._acceptor.start(self._listeners, config.backlog)
        await super().startup(sockets=[])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            await self._acceptor.stop()
        await super().shutdown(self._listeners)


def build_server(app: FastAPI, settings: ApiSettings, listen: ListenSettings) -> BoundedServer:
    """The server, not yet running: `run()` blocks until a signal, `should_exit = True` stops it from any thread."""
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        loop=listen.loop,
        http=protocol_with(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=settings.backlog,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=listen.grace_s,
    )
    return BoundedServer(config, settings.max_connections)

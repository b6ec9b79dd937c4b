"""Runs an app on a socket. Decides uvicorn's settings; knows nothing of what the app does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import uvicorn
from fastapi import FastAPI

from server.api.context import ApiContext
from server.api.http_protocol import protocol_with

Loop = Literal["asyncio", "uvloop"]


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where to listen, and how patiently. grace_s: how long answers under way may take to end after a stop signal.

    loop: the event loop. It is named here, because uvicorn's own default depends on what happens to be installed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keep_alive_s: int = 30
    grace_s: int = 30
    backlog: int = 2048
    loop: Loop = "asyncio"


def build_server(app: FastAPI, listen: ListenSettings) -> uvicorn.Server:
    """The server, not yet running: `run()` blocks until a signal, `should_exit = True` stops it from any thread."""
    context = app.state.context
    assert isinstance(context, ApiContext)
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        loop=listen.loop,
        http=protocol_with(context.settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=listen.backlog,
        timeout_keep_alive=listen.keep_alive_s,
        timeout_graceful_shutdown=listen.grace_s,
    )
    return uvicorn.Server(config)

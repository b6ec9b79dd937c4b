"""A real server on a free local port for the length of a block."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from fastapi import FastAPI

from server.api.edge.connections.server import ListenSettings, Loop, build_server

LOOPS: tuple[Loop, ...] = get_args(Loop)


@contextmanager
def serving(app: FastAPI, *, send_buffer_bytes: int | None = None, loop: Loop = "asyncio") -> Iterator[str]:
    """The app's base URL, reachable through a socket."""
    server = build_server(app, app.state.context.settings, ListenSettings(port=0, grace_s=2, loop=loop))
    with socket.socket() as listener:
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="live-server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

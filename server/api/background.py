"""What a server does besides answering: the threads of one app, started and stopped together. Knows no socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from server.api.context import ApiContext
from server.api.store_watch import StoreWatch


@contextmanager
def background(app: FastAPI) -> Iterator[None]:
    """While the block runs, usage is written down, and memory of adapters that left service is freed."""
    context = app.state.context
    assert isinstance(context, ApiContext)
    watch = StoreWatch(context.store, context.engine)
    watch.start()
    context.usage.start()
    try:
        yield
    finally:
        context.usage.stop()
        watch.stop()

"""What a server does besides answering: the threads of one app, started and stopped together. Knows no socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from server.api.context import ApiContext
from server.api.store_watch import StoreWatch
from server.jobs.service import Onboarding
from server.jobs.supervisor import WorkerSupervisor


@contextmanager
def background(app: FastAPI) -> Iterator[None]:
    """While the block runs, usage is written down, the store is followed, and jobs are worked on."""
    context = app.state.context
    assert isinstance(context, ApiContext)
    watch = StoreWatch(context.store, context.engine, context.metrics.quarantined)
    jobs = _job_worker(app)
    watch.start()
    context.usage.start()
    jobs.start()
    try:
        yield
    finally:
        jobs.stop()
        context.usage.stop()
        watch.stop()


def _job_worker(app: FastAPI) -> WorkerSupervisor:
    onboarding = app.state.onboarding
    assert isinstance(onboarding, Onboarding)
    return WorkerSupervisor(onboarding)

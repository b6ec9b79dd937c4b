"""Threads of one app besides its requests, started and stopped together. Knows no socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from server.api.context import ApiContext
from server.api.memory_trim import MemoryTrim
from server.api.store_watch import StoreWatch
from server.jobs.service import Onboarding
from server.jobs.worker.supervisor import WorkerSupervisor


@contextmanager
def background(app: FastAPI) -> Iterator[None]:
    """While the block runs: save usage, follow the store, run jobs, return freed memory to the system."""
    context = app.state.context
    assert isinstance(context, ApiContext)
    watch = StoreWatch(context.store, context.engine, context.metrics.quarantined)
    jobs, memory = _job_worker(app), MemoryTrim()
    memory.start()
    watch.start()
    context.usage.start()
    jobs.start()
    try:
        yield
    finally:
        jobs.stop()
        context.usage.stop()
        watch.stop()
        memory.stop()


def _job_worker(app: FastAPI) -> WorkerSupervisor:
    onboarding = app.state.onboarding
    assert isinstance(onboarding, Onboarding)
    return WorkerSupervisor(onboarding)

"""Threads of one app besides its requests, started and stopped together. Knows no socket.

Every request asks the store which adapter it may use. StoreWatch only frees host and device memory of adapters that no
request can reach any more, and counts the quarantine; it knows digests, not names.

Memory that threads freed stays in the C library's arenas until MemoryTrim gives it back to the system; glibc trims the
end of the main arena only. A trim takes 1 to 2 ms. How many arenas there are: `lora_kernels.process`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import Gauge

from adapters_store.errors import StoreError
from adapters_store.storage.database import POLL_S
from adapters_store.store import AdapterStore
from lora_kernels.process import c_library_trim
from server.api.batches.runner import BatchRunner
from server.api.context import ApiContext
from server.api.edge.shared_quotas import SharedQuotas
from server.api.engine_client import EngineClient
from server.jobs.service import Onboarding
from server.jobs.settings import JobSettings
from server.jobs.worker.supervisor import SupervisorSettings, WorkerSupervisor

_log = logging.getLogger(__name__)

TRIM_EVERY_S = 10.0
SWEEP_EVERY_S = 600.0


class Part(Protocol):
    """What runs beside the requests."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


@contextmanager
def background(app: FastAPI, jobs: JobSettings | None = None) -> Iterator[None]:
    """While the block runs: save usage, count quotas, follow the store, run jobs and batches, return freed
    memory to the system.

    jobs: how; beside this machine's server by default.
    """
    context = app.state.context
    assert isinstance(context, ApiContext)
    watch = StoreWatch(context.store, context.engine, context.metrics.quarantined, poll_s=context.store.database.poll_s)
    onboarding = app.state.onboarding
    assert isinstance(onboarding, Onboarding)
    sweep, batches = _blob_sweep(context.store, onboarding), BatchRunner(context, onboarding)
    workers = _job_workers(onboarding, jobs or JobSettings())
    quotas = [context.meters] if isinstance(context.meters, SharedQuotas) else []
    parts: list[Part] = [MemoryTrim(), watch, context.usage, sweep, *quotas, *workers, batches]
    with ExitStack() as running:
        running.callback(context.grammars.close)
        for part in parts:
            part.start()
            running.callback(part.stop)
        running.enter_context(context.store.following())
        yield


class Every:
    """A thread that calls `action` every `every_s`, for the first time after that; no thread without an action."""

    def __init__(self, every_s: float, name: str, action: Callable[[], object] | None) -> None:
        self._every_s = every_s
        self._action = action
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        if self._action is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        assert self._action is not None
        while not self._stop.wait(self._every_s):
            self._action()


class MemoryTrim(Every):
    """None if the C library has no such call."""

    def __init__(self, *, every_s: float = TRIM_EVERY_S) -> None:
        super().__init__(every_s, "memory-trim", c_library_trim())


def _blob_sweep(store: AdapterStore, onboarding: Onboarding) -> Every:
    """Checks the object store, if the blobs are in one: one server at a time does."""

    def sweep() -> None:
        try:
            removed = store.sweep_remote().blobs
            num_files = onboarding.files.sweep_remote()
        except StoreError as error:
            _log.warning("the object store was not swept: %s", error.message)
            return
        if removed or num_files:
            _log.info("removed %d adapters and %d files from the object store", len(removed), num_files)

    return Every(SWEEP_EVERY_S, "blob-sweep", None if store.remote is None else sweep)


def _job_workers(onboarding: Onboarding, settings: JobSettings) -> list[WorkerSupervisor]:
    return [] if settings.worker == "off" else [WorkerSupervisor(onboarding, SupervisorSettings(jobs=settings))]


class StoreWatch:
    """Checks whether the engine holds adapters that are out of service, after each change of the store that this
    process makes or hears of. Every `poll_s` it asks the store whether another process made one.

    Without a change it checks every `at_least_s`: a load may end after the check that should have seen it. Checks take
    at most a tenth of the time, however many changes there are.
    """

    def __init__(
        self,
        store: AdapterStore,
        engine: EngineClient,
        quarantined: Gauge,
        *,
        poll_s: float = POLL_S,
        at_least_s: float = 5.0,
    ) -> None:
        self._store = store
        self._engine = engine
        self._quarantined = quarantined
        self._poll_s = poll_s
        self._at_least_s = at_least_s
        self._generation: int | None = None
        self._looked_s = float("-inf")
        self._stop = threading.Event()
        self._woken = threading.Event()
        store.database.on_change(self._woken.set)
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._woken.set()
        self._thread.join()

    def look(self) -> None:
        """Free adapters that left service, count quarantined ones. Raises StoreError (the database does not answer)."""
        generation, now_s = self._store.database.generation(), time.monotonic()
        if generation == self._generation and now_s - self._looked_s < self._at_least_s:
            return
        if generation != self._generation:
            self._engine.retry_adapters()  # a push of the same content heals what could not be loaded
        self._store.forget_answers()  # or a name that was just unloaded could still be resolved, and loaded again
        gone = self._store.not_in_service(list(self._engine.stats().held_adapters))
        if gone:
            _log.info("freeing %d adapters that are not in service any more", len(gone))
            self._engine.forget_adapters(gone)
        self._quarantined.set(len(self._store.quarantine.entries()))
        self._generation, self._looked_s = generation, now_s

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            self._woken.wait(self._poll_s)
            self._woken.clear()
            if self._stop.is_set():
                return
            start_s = time.perf_counter()
            try:
                self.look()
            except StoreError as error:
                _log.warning("the store does not answer; adapters out of service stay in memory: %s", error)
            pause_s = min(self._poll_s, 9 * (time.perf_counter() - start_s))

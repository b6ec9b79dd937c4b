"""Answers the lines of batches, on a thread and an event loop of its own, when the server has room. Decides the pace.

While no client asks anything, `at_once` lines are answered at once; beside others one, and none is begun while
a request waits. A tenant's batches run one after the other; tenants alternate. Answers are kept a few times a second:
a killed server loses only the lines that it was answering, and the next server answers these.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from adapters_store.errors import StoreError, UserError
from adapters_store.storage.database import now_s
from server.api.batches.files import BatchFile, answered_line, end_batch, request_id
from server.api.batches.lead import Lead
from server.api.batches.line_app import LineApp
from server.api.batches.lines import Line
from server.api.context import ApiContext
from server.jobs.service import Onboarding
from server.jobs.store.batch_store import AnsweredLine, Batch, BatchEnd, BatchStatus

_log = logging.getLogger(__name__)

TICK_S = 0.2
IDLE_S = 1.0  # between two polls, if there is no batch
AWAY_S = 5.0  # between two tries to lead, and after an error of the store
MAX_TRIES = 3
RETRY_S = 1.0  # before the second try, twice that before the third: what was away may be back
_RETRIED = frozenset({429, 500, 502, 503, 504})


@dataclass(slots=True, eq=False)
class OpenBatch:
    """A batch in progress. todo: numbers of lines that are neither answered nor in progress. running: those that are.
    paused: those that are tried again in a moment. done: answers that are not kept yet."""

    batch: Batch
    file: BatchFile
    todo: deque[int]
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    paused: set[int] = field(default_factory=set)
    done: list[AnsweredLine] = field(default_factory=list)
    tries: Counter[int] = field(default_factory=Counter)

    @property
    def is_answered(self) -> bool:
        return not (self.todo or self.running or self.paused or self.done)

    def resume(self, number: int) -> None:
        """Queue a paused line behind the others."""
        self.paused.discard(number)
        self.todo.append(number)

    def stop(self) -> None:
        for task in self.running.values():
            task.cancel()
        self.running.clear()


class BatchRunner:
    """Between `start` and `stop` it works through all batches of the served base."""

    def __init__(self, context: ApiContext, onboarding: Onboarding) -> None:
        self._context = context
        self._onboarding = onboarding
        self._store = onboarding.batches
        self._at_once = onboarding.batch_limits.at_once
        self._lines = LineApp(context)
        self._lead = Lead(context.store.database, onboarding.data_dir, context.engine.base.digest)
        self._open: dict[str, OpenBatch] = {}
        self._turn = 0
        self._wake: asyncio.Event | None = None
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), name="batches", daemon=True)

    def start(self) -> None:
        if self._at_once:
            self._thread.start()

    def stop(self) -> None:
        """Lines in progress are given up; the next server answers them."""
        self._stopping.set()
        if not self._thread.is_alive():
            return
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken)
        self._thread.join()

    async def _work(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                pause_s = await self._poll()
                if not self._stopping.is_set():
                    await self._pause(pause_s)
        finally:
            self._give_up()
            self._lead.close()

    async def _pause(self, seconds: float) -> None:
        assert self._wake is not None
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _poll(self) -> float:
        """Advance all batches; returns the wait until the next poll."""
        try:
            if not self._lead.holds():
                self._give_up()
                return AWAY_S
            return await self._step()
        except StoreError as error:
            _log.warning("batches wait: %s", error.message)
        except Exception:  # noqa: BLE001  a fault of one batch must not end the others for good
            _log.exception("batches wait after an internal error")
            self._give_up()  # they are opened again: an object store's cache may have dropped a file
        return AWAY_S

    async def _step(self) -> float:
        self._keep()
        batches = self._store.unfinished(self._context.engine.base.digest)
        known = {batch.id for batch in batches}
        for gone in [each for each in self._open if each not in known]:
            self._open.pop(gone).stop()
        for batch in _due(batches):
            await self._advance(batch)
        self._begin_lines([each for each in self._open.values() if self._may_run(each.batch)])
        return TICK_S if self._open else IDLE_S

    async def _advance(self, batch: Batch) -> None:
        """Open a new batch; end one that is answered, cancelled or too old."""
        opened = self._open.get(batch.id) or await asyncio.to_thread(self._opened, batch)
        if opened is None:
            return
        self._open[batch.id] = opened
        status: BatchStatus | None = None
        if batch.status is BatchStatus.CANCELLING:
            status = BatchStatus.CANCELLED
        elif opened.is_answered:
            self._store.begin_finalizing(batch)
            status = BatchStatus.COMPLETED
        elif now_s() >= batch.expires_at:
            status = BatchStatus.EXPIRED
        if status is not None:
            opened.stop()
            self._keep()
            await asyncio.to_thread(end_batch, self._onboarding, batch, opened.file, status)
            del self._open[batch.id]
            _log.info("batch %s of %s is %s", batch.id, batch.tenant, status.value)

    def _opened(self, batch: Batch) -> OpenBatch | None:
        """None for a batch whose file cannot be read: it has failed."""
        try:
            input_file = self._onboarding.files.get(batch.tenant, batch.input_file_id)
            path = self._onboarding.files.present_path(input_file)
        except StoreError as error:
            if error.code not in {"file_not_found", "blob_missing", "blob_damaged"}:
                raise
            self._store.end(batch, BatchEnd(status=BatchStatus.FAILED, error=(error.code, error.message)))
            return None
        file = BatchFile(batch, path)
        answered = self._store.answered(batch)
        return OpenBatch(batch, file, deque(number for number in range(len(file)) if number not in answered))

    def _may_run(self, batch: Batch) -> bool:
        return not self._context.store.tenants.get(batch.tenant).disabled

    def _begin_lines(self, batches: list[OpenBatch]) -> None:
        """As many as the server has room for: each tenant's oldest batch, in rotation."""
        num_free = self._num_free()
        while num_free > 0:
            waiting = _oldest_of_each(each for each in batches if each.todo)
            if not waiting:
                return
            self._turn += 1
            self._begin_line(waiting[self._turn % len(waiting)])
            num_free -= 1

    def _num_free(self) -> int:
        engine, clients = self._context.engine, self._context.draining
        if clients.is_on or not engine.is_ready():
            return 0
        num_running = sum(len(each.running) for each in self._open.values())
        if not clients.num_inside:
            return self._at_once - num_running
        return 1 - num_running if engine.stats().num_waiting == 0 else 0

    def _begin_line(self, opened: OpenBatch) -> None:
        number = opened.todo.popleft()
        opened.running[number] = asyncio.create_task(self._answer(opened, number, opened.file.line(number)))

    async def _answer(self, opened: OpenBatch, number: int, line: Line) -> None:
        batch = opened.batch
        answer = await self._lines.answer(
            batch.tenant,
            batch.endpoint,
            line.body,
            request_id=request_id(batch, number),
            actor=f"batch:{batch.id}",
        )
        opened.tries[number] += 1
        opened.running.pop(number, None)
        if answer.status in _RETRIED and opened.tries[number] < MAX_TRIES:
            opened.paused.add(number)
            asyncio.get_running_loop().call_later(RETRY_S * opened.tries[number], opened.resume, number)
            return
        opened.done.append(answered_line(batch, number, line, answer))
        self._woken()

    def _keep(self) -> None:
        for opened in self._open.values():
            if opened.done:
                self._store.keep(opened.batch, opened.done)
                opened.done = []

    def _give_up(self) -> None:
        """Keep what is answered, end the rest."""
        try:
            self._keep()
        except UserError as error:
            _log.warning("%d batches: their last answers are not kept: %s", len(self._open), error)
        for opened in self._open.values():
            opened.stop()
        self._open.clear()

    def _woken(self) -> None:
        if self._wake is not None:
            self._wake.set()


def _due(batches: list[Batch]) -> list[Batch]:
    """Each tenant's oldest, and all that end without further lines. batches: the oldest first."""
    oldest = {batch.tenant: batch for batch in reversed(batches)}
    is_last = (BatchStatus.CANCELLING, BatchStatus.FINALIZING)
    return [
        batch
        for batch in batches
        if batch is oldest[batch.tenant] or batch.status in is_last or now_s() >= batch.expires_at
    ]


def _oldest_of_each(batches: Iterable[OpenBatch]) -> list[OpenBatch]:
    """The first batch of every tenant. batches: the oldest first."""
    first: dict[str, OpenBatch] = {}
    for each in batches:
        first.setdefault(each.batch.tenant, each)
    return [*first.values()]

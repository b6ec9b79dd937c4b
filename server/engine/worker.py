"""The one thread that owns the engine. Others send commands; each request's events come back to its listener."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.errors import UserError
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.entries import Owner, Residency
from lora_kernels.background import TimeSlices
from server.engine.engine import Engine
from server.engine.int8_probe import Int8Probe
from server.engine.metrics import EngineStats
from server.engine.request import InvalidRequest, QueueFull, Request, RequestError, TokenEvent
from server.engine.sampling.sampler import validate_params
from server.engine.text.tokenizer import Tokenizer
from server.engine.text.vocabulary import Vocabulary

Listener = Callable[[TokenEvent], None]
Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)
_STATS_EVERY_S = 0.25
SWITCH_S = 1e-4  # how long another thread's Python may keep this one from its next kernel; Python's own is 5 ms


class EngineWorker:
    """Thread-safe front of an Engine. Every submitted request gets exactly one final event, whatever happens."""

    def __init__(
        self,
        engine: Engine,
        base: BaseDescription,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        *,
        max_model_len: int,
        num_threads: int | None = None,
        slices: TimeSlices | None = None,
        int8_probe: Int8Probe,
    ) -> None:
        """base, tokenizer, vocabulary, max_model_len: as callers see the model. int8_probe: how int8 adapters are
        measured before they are published. device_error, when the engine has stopped: why the device has failed for
        good, so that only a new process can serve; None: it has not."""
        self._engine = engine
        self._slices = slices or TimeSlices()
        self.base = base
        self.served_name = base.name
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.max_model_len = max_model_len
        self.int8_probe = int8_probe
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._arriving: Counter[str] = Counter()  # by tenant: submitted, not in the queue yet
        self._listeners: dict[str, Listener] = {}
        self._stats = engine.stats()
        self._stats_due_s = 0.0
        self._is_woken = False
        self._is_stopping = False
        self._failure: BaseException | None = None
        self.device_error: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; unfinished requests get an "abort" event."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request, listener: Listener) -> None:
        """Queue a request; `listener` is called on the engine's thread. Raises InvalidRequest or QueueFull at once."""
        validate_params(request.params, self.vocabulary.size)
        limits = self._engine.scheduler.limits
        limits.check_fits(request)
        with self._changed:
            self._require_running()
            arriving, own = self._arriving.total(), self._arriving[request.tenant]
            limits.check_queue(request.tenant, num_arriving=arriving, num_arriving_of_tenant=own)
            self._arriving[request.tenant] += 1
            self._commands.append(lambda: self._add(request, listener))
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """End a request whose client is gone. Unknown or finished ids do nothing."""
        self._send(lambda: self._deliver([event] if (event := self._engine.abort(request_id)) is not None else []))

    def forget_adapters(self, digests: Sequence[AdapterDigest]) -> None:
        """Free the memory of deleted adapters, once no request uses them."""
        for digest in digests:
            self._send(lambda digest=digest: self._engine.forget_adapter(digest))  # type: ignore[misc]

    def retry_adapters(self) -> None:
        """The store has changed: try again to load adapters that failed."""
        self._send(self._engine.tiers.retry_failed)

    def warm_adapter(self, digest: AdapterDigest, name: str, owner: Owner) -> Future[Residency]:
        """See `Engine.warm_adapter`. Raises QueueFull if the engine is stopping."""
        return self._call(lambda: self._engine.warm_adapter(digest, name, owner))

    def pin_adapter(self, digest: AdapterDigest) -> Future[Residency]:
        """See `Engine.pin_adapter`. Raises QueueFull if the engine is stopping."""
        return self._call(lambda: self._engine.pin_adapter(digest))

    def unpin_adapter(self, digest: AdapterDigest) -> Future[Residency]:
        """See `Engine.unpin_adapter`. Raises QueueFull if the engine is stopping."""
        return self._call(lambda: self._engine.unpin_adapter(digest))

    def int8_change(self, plain: PackedAdapter, small: PackedAdapter) -> Future[float]:
        """Measured between two steps, see `int8_probe`. Raises QueueFull if the engine is stopping."""
        return self._call(lambda: self.int8_probe(plain, small))

    def wake(self) -> None:
        """Let the engine continue: an adapter it waits for was loaded. Any thread may call it."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def end(self, error: Exception) -> None:
        """No later step can succeed: end the engine as if the next one had raised this. Any thread may call it."""

        def fail() -> None:
            raise error

        self._send(fail)

    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    def is_ready(self) -> bool:
        return self.is_healthy() and not self._is_stopping

    def stats(self) -> EngineStats:
        """The latest snapshot, at most a quarter of a second older than the engine's last step."""
        return self._stats

    def _require_running(self) -> None:
        if self._is_stopping or self._failure is not None:
            raise QueueFull("the engine is stopping", retry_after_s=5.0)

    def _call(self, command: Callable[[], Answer]) -> Future[Answer]:
        """Run it between two steps; its answer, or its refusal. Any other error ends the engine, as in a step."""
        answer: Future[Answer] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(command())
            except BaseException as error:
                answer.set_exception(error)
                if not isinstance(error, UserError):
                    raise

        with self._changed:
            self._require_running()
            self._commands.append(run)
            self._changed.notify()
        return answer

    def _send(self, command: Callable[[], None]) -> None:
        """Run it between two steps. An engine that is stopping ends all requests itself, and needs no command."""
        with self._changed:
            if self._is_stopping:
                return
            self._commands.append(command)
            self._changed.notify()

    def _add(self, request: Request, listener: Listener) -> None:
        with self._changed:
            self._arriving[request.tenant] -= 1
            if not self._arriving[request.tenant]:
                del self._arriving[request.tenant]
        request.arrival_s = time.monotonic()
        self._listeners[request.id] = listener
        try:
            self._engine.add(request)
        except (InvalidRequest, QueueFull) as error:  # checked at submit: another took the queue's last entry
            failure = RequestError("queue_full", error.message, status=429)
            self._deliver([TokenEvent(request.id, finish_reason="error", error=failure)])

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.get_num_threads()  # settles this thread's default, or its first op would, over what is set now
            torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(SWITCH_S)
        gc.collect()
        gc.freeze()  # what is loaded stays: scanning it stalled a step by 140 to 210 ms
        try:
            while not self._is_stopping:
                while self._commands:
                    self._commands.popleft()()
                self._deliver(self._engine.step())
                self._idle()
        except BaseException as error:  # noqa: BLE001  a panic in Rust is no Exception: answer all requests, report unhealthy
            self._failure = error  # from here on /health is red
            _log.exception("the engine stopped on an error")
            self.device_error = self._engine.device_error()  # a copy may fail before the forward that it is for
            if self.device_error is not None:
                _log.critical("the device has failed, and the process must be restarted: %s", self.device_error)
        gc.unfreeze()
        self._end_all()

    def _idle(self) -> None:
        """Refresh the stats from time to time, and sleep while there is nothing to do."""
        idle_s, now_s = self._engine.idle_s, time.monotonic()
        if idle_s != 0.0 or now_s >= self._stats_due_s:
            self._stats = self._engine.stats()
            self._stats_due_s = now_s + _STATS_EVERY_S
        if idle_s == 0.0:
            self._slices.grant()
            return
        self._slices.lift()
        with self._changed:
            if not (self._commands or self._is_stopping or self._is_woken):
                self._changed.wait(idle_s)
            self._is_woken = False

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            listener = self._listeners.get(event.request_id)
            if listener is None:
                continue
            if event.finish_reason is not None:
                del self._listeners[event.request_id]
            try:
                listener(event)
            except RuntimeError:  # the listener's event loop is closed: no client waits for this answer
                _log.warning("request %s has no listener any more: its event loop is closed", event.request_id)
                self._listeners.pop(event.request_id, None)
                if not self._is_stopping:
                    self._engine.abort(event.request_id)

    def _end_all(self) -> None:
        self._slices.lift()
        with self._changed:
            self._is_stopping = True
            arriving, self._commands = list(self._commands), deque()
        for command in arriving:
            try:
                command()
            except Exception:  # noqa: BLE001  one command that fails must not keep the others from running
                _log.exception("a command failed while the engine stopped")
        error = None if self._failure is None else RequestError("engine_stopped", "the engine stopped on an error")
        for request_id in list(self._listeners):
            event = TokenEvent(request_id, finish_reason="error" if error else "abort", error=error)
            self._deliver([event])
        _log.info("the engine has stopped")

"""Decides which requests are refused at submission, and which have passed their deadline. Knows limits, counts and
moments; knows no order.
"""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush

from server.engine.queueing.waiting_queue import WaitingQueue
from server.engine.request import InvalidRequest, QueueFull, Request
from server.engine.schedule import SchedulerSettings

_FEW = 64  # deadlines of ended requests that stay listed


class RequestLimits:
    """Checks at submission. Any thread may ask.

    max_model_len, kv_tokens: what prompt and output of a request must fit.
    """

    def __init__(
        self, settings: SchedulerSettings, waiting: WaitingQueue, *, max_model_len: int, kv_tokens: int
    ) -> None:
        self._settings = settings
        self._waiting = waiting
        self._max_model_len = max_model_len
        self._kv_tokens = kv_tokens

    def check_queue(self, tenant: str, *, num_arriving: int = 0, num_arriving_of_tenant: int = 0) -> None:
        """Raises QueueFull if this tenant may not queue one more. num_arriving: submitted, not in the queue yet."""
        settings = self._settings
        num_waiting = len(self._waiting) + num_arriving
        if num_waiting >= settings.max_waiting:
            message = f"{num_waiting} requests wait already (max_waiting {settings.max_waiting})"
            raise QueueFull(message, retry_after_s=settings.retry_after_s)
        num_waiting = self._waiting.num_waiting_of(tenant) + num_arriving_of_tenant
        if num_waiting >= settings.max_waiting_per_tenant:
            limit = f"max_waiting_per_tenant {settings.max_waiting_per_tenant}"
            raise QueueFull(
                f"{num_waiting} requests of {tenant} wait already ({limit})", retry_after_s=settings.retry_after_s
            )

    def check_fits(self, request: Request) -> None:
        """Raises InvalidRequest if the request can never run."""
        num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
        num_tokens = num_prompt + max_tokens
        if num_prompt == 0:
            raise InvalidRequest("prompt", "prompt must have at least 1 token, got 0")
        limit = min(self._max_model_len, self._kv_tokens)
        if num_tokens <= limit:
            return
        param = "prompt" if num_prompt >= limit else "max_tokens"
        what = "context length" if limit == self._max_model_len else "KV cache"
        message = f"prompt of {num_prompt} + max_tokens of {max_tokens} = {num_tokens} tokens, {what} is {limit}"
        raise InvalidRequest(param, message, code="context_length_exceeded")


class Deadlines:
    """A heap of deadlines. A request that finished in time stays listed until such requests are most of the heap."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def watch(self, request_id: str, deadline_s: float) -> None:
        """deadline_s: in seconds of the caller's clock."""
        heappush(self._heap, (deadline_s, request_id))

    def drop_ended(self, unfinished: Collection[str]) -> None:
        """unfinished: ids of all requests that have not ended. Takes time only when the heap has doubled."""
        if len(self._heap) > 2 * len(unfinished) + _FEW:
            self._heap = [entry for entry in self._heap if entry[1] in unfinished]
            heapify(self._heap)

    def take_late(self, now_s: float) -> list[str]:
        """Ids whose deadline has passed, each once."""
        late: list[str] = []
        while self._heap and self._heap[0][0] <= now_s:
            late.append(heappop(self._heap)[1])
        return late

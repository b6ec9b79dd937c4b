"""Watches one HTTP call's sequences from submission to their last event: times for the metrics, and one record of all
for the log and the traces. Decides what is measured; knows no route and no socket."""

from __future__ import annotations

import time

from server.api.edge.request_context import note
from server.api.generation.call import Call
from server.api.telemetry.call_record import CallRecord
from server.api.telemetry.metrics import ApiMetrics
from server.engine.request import TokenEvent


class CallMeter:
    """Made at submission, closed once; every event passes through `saw`."""

    def __init__(self, metrics: ApiMetrics, call: Call) -> None:
        self._metrics = metrics
        self._call = call
        self._labels = metrics.owner_labels(call.target.tenant, call.target.label)
        self._num_output_tokens = [0] * len(call.requests)
        self._num_prompt_tokens = [0] * len(call.requests)
        self._num_cached_tokens = [0] * len(call.requests)
        self._last_s: list[float | None] = [None] * len(call.requests)
        self._record = CallRecord(
            call_id=call.id,
            tenant=call.target.tenant,
            model=call.target.model,
            adapter=call.target.label,
            num_sequences=len(call.requests),
            start_s=time.perf_counter(),
        )

    def saw(self, index: int, event: TokenEvent, now_s: float) -> None:
        self._num_prompt_tokens[index] = event.num_prompt_tokens or self._num_prompt_tokens[index]
        if event.finish_reason is not None:
            self._saw_end(index, event)
        if not event.token_ids:
            return
        last_s = self._last_s[index]
        if last_s is None:
            self._saw_first_token(index, event, now_s)
        else:
            self._metrics.inter_token_seconds.observe(now_s - last_s)
        self._last_s[index] = now_s
        self._num_output_tokens[index] += len(event.token_ids)

    def refused(self, code: str) -> None:
        """The engine did not take the call."""
        self._record.error_code = code
        self._metrics.failures.labels(self._metrics.error_label(code)).inc()

    def close(self, *, aborted: int) -> CallRecord:
        metrics, record = self._metrics, self._record
        record.end_s = time.perf_counter()
        record.num_prompt_tokens = sum(self._num_prompt_tokens)
        record.num_cached_tokens = sum(self._num_cached_tokens)
        record.num_output_tokens = sum(self._num_output_tokens)
        metrics.sequences.labels(*self._labels).inc(len(self._last_s))
        metrics.prompt_tokens.labels(*self._labels).inc(record.num_prompt_tokens)
        metrics.cached_tokens.labels(*self._labels).inc(record.num_cached_tokens)
        metrics.output_tokens.labels(*self._labels).inc(record.num_output_tokens)
        if aborted:
            metrics.aborted.inc(aborted)
        _log(record, aborted)
        return record

    def _saw_first_token(self, index: int, event: TokenEvent, now_s: float) -> None:
        record, request = self._record, self._call.requests[index]
        self._metrics.first_token_seconds.observe(now_s - record.start_s)
        self._num_cached_tokens[index] = event.num_cached_tokens
        if record.first_token_s is None:
            record.first_token_s = now_s
        if request.first_scheduled_s is not None:  # both are the engine's clock: its difference is what counts
            queue_s = max(0.0, request.first_scheduled_s - request.arrival_s)
            self._metrics.queue_seconds.observe(queue_s)
            if record.first_scheduled_s is None:
                record.first_scheduled_s = min(now_s, record.start_s + queue_s)

    def _saw_end(self, index: int, event: TokenEvent) -> None:
        self._record.finish_reasons.append(event.finish_reason or "")
        if event.error is not None:
            self._record.error_code = event.error.code
            self._metrics.failures.labels(self._metrics.error_label(event.error.code)).inc()


def _log(record: CallRecord, aborted: int) -> None:
    """What the access log says of a generation."""
    first_s = record.first_token_s
    note(
        call=record.call_id,
        tenant=record.tenant,
        adapter=record.adapter,
        prompt_tokens=record.num_prompt_tokens,
        cached_tokens=record.num_cached_tokens,
        completion_tokens=record.num_output_tokens,
        ttft_ms=None if first_s is None else round((first_s - record.start_s) * 1000, 1),
        aborted=aborted or None,
        error=record.error_code,
    )

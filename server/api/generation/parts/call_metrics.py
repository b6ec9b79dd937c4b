"""Times one HTTP call's sequences from submission to their last event, for the metrics, the log and the traces.

Decides what is measured; knows no route and no socket. `progress` counts the tokens.
"""

from __future__ import annotations

import time

from server.api.edge.request_context import note
from server.api.generation.call import Call
from server.api.generation.parts.progress import CallProgress
from server.api.telemetry.call_record import CallRecord
from server.api.telemetry.metrics import ApiMetrics
from server.engine.request import TokenEvent


class CallMetrics:
    """Made at submission, closed once; every event passes through `saw`."""

    def __init__(self, metrics: ApiMetrics, call: Call, progress: CallProgress) -> None:
        self._metrics = metrics
        self._call = call
        self._progress = progress
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
        if event.finish_reason is not None:
            self._record.finish_reasons.append(event.finish_reason)
        if event.error is not None:
            self.failed(event.error.code)
        if not event.token_ids:
            return
        last_s = self._last_s[index]
        if last_s is None:
            self._saw_first_token(index, now_s)
        else:
            self._metrics.inter_token_seconds.observe(now_s - last_s)
        self._last_s[index] = now_s

    def failed(self, code: str) -> None:
        """A sequence ended with this error, or the engine did not take the call."""
        self._record.error_code = code
        self._metrics.failures.labels(self._metrics.error_label(code)).inc()

    def close(self, *, num_aborted: int) -> CallRecord:
        record, progress = self._record, self._progress
        record.end_s = time.perf_counter()
        record.num_prompt_tokens = progress.num_read_tokens
        record.num_cached_tokens = progress.num_cached_tokens
        record.num_output_tokens = progress.num_output_tokens
        self._metrics.count_call(record, num_aborted)
        first_s = record.first_token_s
        note(
            call=record.call_id,
            tenant=record.tenant,
            adapter=record.adapter,
            prompt_tokens=record.num_prompt_tokens,
            cached_tokens=record.num_cached_tokens,
            completion_tokens=record.num_output_tokens,
            ttft_ms=None if first_s is None else round((first_s - record.start_s) * 1000, 1),
            aborted=num_aborted or None,
            error=record.error_code,
        )
        return record

    def _saw_first_token(self, index: int, now_s: float) -> None:
        record, request = self._record, self._call.requests[index]
        self._metrics.first_token_seconds.observe(now_s - record.start_s)
        if record.first_token_s is None:
            record.first_token_s = now_s
        if request.first_scheduled_s is not None:  # both are the engine's clock: its difference is what counts
            queue_s = max(0.0, request.first_scheduled_s - request.arrival_s)
            self._metrics.queue_seconds.observe(queue_s)
            if record.first_scheduled_s is None:
                record.first_scheduled_s = min(now_s, record.start_s + queue_s)

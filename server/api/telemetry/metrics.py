"""Counts what the API did, for Prometheus. Decides names, labels and their bounds; `call_metrics` feeds it.

No histogram carries a tenant; counters carry at most `max_label_values` tenant/adapter pairs, then "other".
"""

from __future__ import annotations

import shutil
import threading
import time
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from adapters_store.versions.served_names import ServedNames
from server.api.engine_client import EngineClient
from server.api.telemetry.call_record import CallRecord
from server.api.telemetry.engine_metrics import EngineCollector
from server.engine.metrics import SECONDS

router = APIRouter()

OTHER = "other"
SEVERAL = "+"  # between the versions of one request; no name holds it
MAX_ERROR_CODES = 40
# Counted from 0: a series that begins at its first failure has no increase, and an alert would miss it.
ALERTED_CODES = ("adapter_numerics", "queue_full")


class MetricsText:
    """The text of /metrics: rendered on a thread, because it asks the store, and kept for some milliseconds. Inference
    routers read it every 50 ms, each for itself; readers that come together share one text.

    max_age_s: how old a text may be when it is answered with; 0: every reader has a new one.
    """

    def __init__(self, registry: CollectorRegistry, max_age_s: float) -> None:
        self._registry = registry
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._text = b""
        self._rendered_s = float("-inf")

    async def read(self) -> bytes:
        return self._text if self._is_fresh() else await run_in_threadpool(self._render)

    def _render(self) -> bytes:
        with self._lock:
            if not self._is_fresh():
                begun_s = time.monotonic()
                self._text = generate_latest(self._registry)
                self._rendered_s = begun_s
            return self._text

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._rendered_s < self._max_age_s


class ApiMetrics:
    """All of one app's metrics, in a registry of its own: two apps in one process share none."""

    def __init__(
        self,
        engine: EngineClient,
        max_label_values: int,
        data_dir: Path,
        names: ServedNames | None = None,
        *,
        max_age_s: float = 0.0,
    ) -> None:
        self.registry = CollectorRegistry()
        self.text = MetricsText(self.registry, max_age_s)
        self.registry.register(EngineCollector(engine, names))
        ProcessCollector(registry=self.registry)
        self._max_label_values = max_label_values
        self._owners: set[tuple[str, str]] = set()
        self._error_codes: set[str] = set()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.http_requests = counter("multilora_http_requests", "HTTP requests answered", ("route", "method", "status"))
        self.http_seconds = histogram(
            "multilora_http_request_seconds", "From the request to the end of its answer", ("route",)
        )
        self.first_token_seconds = histogram(
            "multilora_time_to_first_token_seconds", "From submission to the first token"
        )
        self.queue_seconds = histogram(
            "multilora_queue_seconds", "From arrival to the first forward pass, the load of the adapter included"
        )
        self.inter_token_seconds = histogram("multilora_inter_token_seconds", "Between two token events of a request")
        self.aborted = counter("multilora_aborted_sequences", "Sequences that a hang-up or a failure ended")
        self.failures = counter("multilora_failures", "Sequences ended by an error", ("code",))
        for code in ALERTED_CODES:
            self.failures.labels(self.error_label(code))
        self.quarantined = gauge(
            "multilora_adapters_quarantined", "Adapters not served until they are healed or released"
        )
        free = gauge("multilora_data_dir_free_bytes", "Bytes free on the disk of the data directory")
        free.set_function(partial(_free_bytes, data_dir))
        owner = ("tenant", "adapter")
        self.sequences = counter("multilora_sequences", "Sequences asked for", owner)
        self.prompt_tokens = counter("multilora_prompt_tokens", "Prompt tokens", owner)
        self.cached_tokens = counter(
            "multilora_cached_prompt_tokens", "Prompt tokens that the prefix cache gave", owner
        )
        self.output_tokens = counter("multilora_output_tokens", "Generated tokens", owner)

    def owner_labels(self, tenant: str, adapter: str) -> tuple[str, str]:
        """The labels this pair is counted under; the first pairs keep their names. Several adapters in one request get
        names only from the first half: ten of them make 375 sets."""
        pair = (tenant, adapter)
        if pair not in self._owners:
            if len(self._owners) >= self._max_label_values // (2 if SEVERAL in adapter else 1):
                return (OTHER, OTHER)
            self._owners.add(pair)
        return pair

    def count_call(self, record: CallRecord, num_aborted: int) -> None:
        """A call for text is over."""
        owner = self.owner_labels(record.tenant, record.adapter)
        self.sequences.labels(*owner).inc(record.num_sequences)
        self.prompt_tokens.labels(*owner).inc(record.num_prompt_tokens)
        self.cached_tokens.labels(*owner).inc(record.num_cached_tokens)
        self.output_tokens.labels(*owner).inc(record.num_output_tokens)
        if num_aborted:
            self.aborted.inc(num_aborted)

    def error_label(self, code: str) -> str:
        """The code, or "other" beyond MAX_ERROR_CODES of them."""
        if code not in self._error_codes and len(self._error_codes) >= MAX_ERROR_CODES:
            return OTHER
        self._error_codes.add(code)
        return code


def _free_bytes(folder: Path) -> float:
    """NaN if the folder cannot be read: a missing disk must not fail the other metrics."""
    try:
        return float(shutil.disk_usage(folder).free)
    except OSError:
        return float("nan")


@router.get("/metrics", response_class=Response, summary="Prometheus text")
async def show_metrics(request: Request) -> Response:
    metrics = request.app.state.context.metrics
    assert isinstance(metrics, ApiMetrics)
    return Response(await metrics.text.read(), media_type=CONTENT_TYPE_LATEST)

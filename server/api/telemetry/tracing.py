"""OpenTelemetry traces, if the operator asks for them: a span per HTTP request, and one per generation with its phases.

The libraries are an option of the installation (`multilora[otel]`); nothing of them is imported without the flag.
Attributes are named by OpenTelemetry's conventions for generative AI as far as they go.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from server.api.telemetry.call_record import CallRecord

_UNTRACED = "/health,/ready,/metrics"


class TracingUnavailable(Exception):
    """The libraries are not installed, or the endpoint is no URL."""


class OtlpTracing:
    """Spans sent to an OTLP/HTTP collector in batches by a thread of its own; requests never wait for it.

    endpoint: the collector's base URL, as http://127.0.0.1:4318. Raises TracingUnavailable.
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise TracingUnavailable(f"--otlp-endpoint must be a URL with http:// or https://, got {endpoint!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            message = f"--otlp-endpoint needs more libraries: pip install 'multilora[otel]' ({error})"
            raise TracingUnavailable(message) from error
        resource = Resource.create({"service.name": "multilora", "service.version": version("multilora")})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("multilora")

    def instrument(self, app: FastAPI) -> None:
        """A span for every request of the app; a caller's `traceparent` is its parent."""
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=_UNTRACED, exclude_spans=["send", "receive"]
        )

    def record(self, record: CallRecord) -> None:
        """The generation's spans, under the span of the request that this context works for."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        offset_ns = time.time_ns() - int(time.perf_counter() * 1e9)
        span = self._tracer.start_span(
            "generate", start_time=offset_ns + _ns(record.start_s), attributes=_attributes(record)
        )
        if record.error_code is not None:
            span.set_status(Status(StatusCode.ERROR, record.error_code))
            span.set_attribute("error.type", record.error_code)
        for name, start_s, end_s in _phases(record):
            phase = self._tracer.start_span(
                name, context=set_span_in_context(span), start_time=offset_ns + _ns(start_s)
            )
            phase.end(offset_ns + _ns(end_s))
        span.end(offset_ns + _ns(record.end_s))

    def close(self) -> None:
        """Send what is left, for at most a few seconds."""
        self._provider.shutdown()


def _attributes(record: CallRecord) -> dict[str, Any]:
    return {
        "gen_ai.system": "multilora",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.call_id,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "multilora.cached_tokens": record.num_cached_tokens,
        "multilora.tenant": record.tenant,
        "multilora.adapter": record.adapter,
        "multilora.sequences": record.num_sequences,
    }


def _phases(record: CallRecord) -> list[tuple[str, float, float]]:
    """queue: until first scheduled, adapter loads included. prefill: to the first token. decode: to the end."""
    if record.first_scheduled_s is None or record.first_token_s is None:
        return [("queue", record.start_s, record.end_s)]
    return [
        ("queue", record.start_s, record.first_scheduled_s),
        ("prefill", record.first_scheduled_s, record.first_token_s),
        ("decode", record.first_token_s, record.end_s),
    ]


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

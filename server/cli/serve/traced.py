"""Traces for the length of a block, where an endpoint is given. Knows no span."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.api.telemetry.tracing import OtlpTracing, Tracing, TracingUnavailable
from server.cli.common.failures import CommandError, ExitCode


@contextmanager
def traced(endpoint: str | None) -> Iterator[Tracing | None]:
    """What is left is sent at the end. Raises CommandError (tracing_unavailable)."""
    if endpoint is None:
        yield None
        return
    try:
        tracing = OtlpTracing(endpoint)
    except TracingUnavailable as error:
        raise CommandError("tracing_unavailable", str(error), ExitCode.USAGE) from error
    try:
        yield tracing
    finally:
        tracing.close()

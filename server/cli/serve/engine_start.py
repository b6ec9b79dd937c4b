"""Builds and runs an engine for a command and shows its stages. Imports torch: commands import this module late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging as transformers_logging

from adapters_store.base.files import describe_base
from adapters_store.store import AdapterStore
from lora_kernels.native.build import native_build
from server.cli.common.base_path import faults_of_the_base
from server.cli.common.output import Output
from server.cli.common.texts import size
from server.engine.startup.build import EngineParts, build_engine
from server.engine.startup.settings import EngineSettings
from server.jobs.served_base import ServedBase
from server.jobs.store.served_bases import ServedBases


@contextmanager
def running_engine(settings: EngineSettings, store: AdapterStore, output: Output) -> Iterator[EngineParts]:
    """An engine whose worker runs; closed at the end. Raises UnsupportedBase, CommandError (out_of_memory)."""
    transformers_logging.disable_progress_bar()
    with faults_of_the_base(settings.base), ExitStack() as stage:

        def say(text: str) -> None:
            stage.close()
            stage.enter_context(output.stage(text))

        say(_hashing(settings.base))
        describe_base(settings.base, dtype=settings.dtype)
        parts = build_engine(settings, store, report_progress=say)
    try:
        parts.worker.start()
        yield parts
    finally:
        parts.close()


def remember_base(settings: EngineSettings, parts: EngineParts, store: AdapterStore) -> None:
    """Remember what is served: adapters and jobs may arrive while no server runs."""
    store.remember_base(parts.base.description)
    served = ServedBase(
        path=settings.base,
        name=parts.worker.served_name,
        digest=parts.base.description.digest,
        dtype=settings.dtype,
        quantize="nf4" if parts.base.quantized else None,
        device=parts.base.device.type,
    )
    ServedBases(store.database).remember(served)


def show_memory(parts: EngineParts, output: Output) -> None:
    """Show the memory plan, and a warning if the C kernels are off."""
    output.event("memory", **asdict(parts.plan))
    output.table(("memory", parts.plan.device), parts.plan.rows())
    native = native_build()
    if native.library is None and parts.base.device.type == "cpu":
        output.event("warning", code="no_native_kernels", message=native.reason)
        output.say(f"the C kernels are off, and torch serves more slowly: {native.reason}", style="yellow")


def _hashing(base: Path) -> str:
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return f"computing the base's digest ({size(total)}; the next start reuses it)"

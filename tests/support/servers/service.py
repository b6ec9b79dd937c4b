"""A whole engine on a tiny base with published adapters, and what PEFT would answer."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from server.engine.metrics import EngineStats
from server.engine.request import Request, SamplingParams, TokenConstraint, TokenEvent
from server.engine.schedule import SchedulerSettings
from server.engine.startup.build import EngineParts, build_engine
from server.engine.startup.settings import EngineSettings, MemoryBudget
from server.engine.worker import EngineWorker
from support.models.models import peft_model, save_adapters, save_base
from support.models.tokenizer_zoo import byte_level, wrapped

TENANT = "acme"
VOCAB, NUM_TOKENS = 420, 418  # rows of the base, tokens of the tokenizer


class Answer:
    """All events of one request, gathered as its listener."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def collect(self, timeout_s: float = 60.0) -> list[TokenEvent]:
        """Wait for the final event."""
        events = [self.events.get(timeout=timeout_s)]
        while events[-1].finish_reason is None:
            events.append(self.events.get(timeout=timeout_s))
        assert self.events.empty(), "an event after the final one"
        return events

    def tokens(self, timeout_s: float = 60.0) -> list[int]:
        events = self.collect(timeout_s)
        assert events[-1].error is None, events[-1].error
        return [token for event in events for token in event.token_ids]


class Service:
    """A running engine, its store, and its published adapters by kind."""

    def __init__(self, parts: EngineParts, store: AdapterStore, versions: dict[str, AdapterVersion]) -> None:
        self.parts = parts
        self.store = store
        self.versions = versions
        self.worker = parts.worker
        self._ids = itertools.count()

    def ask(
        self,
        prompt: list[int],
        adapter: str | AdapterVersion | None = None,
        *,
        tenant: str = TENANT,
        constraint: TokenConstraint | None = None,
        active_from: int = 0,
        **params: Any,
    ) -> tuple[str, Answer]:
        """Submit; returns (request id, answer to collect)."""
        version = self.versions[adapter] if isinstance(adapter, str) else adapter
        answer = Answer()
        request = Request(
            id=f"r{next(self._ids)}",
            tenant=tenant,
            prompt_ids=prompt,
            params=SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **params}),
            adapter=None if version is None else version.digest,
            adapter_name=None if version is None else version.ref,
            constraint=constraint,
            active_from=active_from,
        )
        self.worker.submit(request, answer.events.put)
        return request.id, answer

    def stats(self) -> EngineStats:
        """See `stats_of`."""
        return stats_of(self.worker)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its engine takes nothing up until this ends: what is asked meanwhile waits together."""
        let_go = threading.Event()
        self.worker._send(lambda: let_go.wait(60))
        try:
            yield
        finally:
            let_go.set()

    def tokens(self, prompt: list[int], adapter: str | AdapterVersion | None = None, **params: Any) -> list[int]:
        return self.ask(prompt, adapter, **params)[1].tokens()


def stats_of(worker: EngineWorker, timeout_s: float = 60.0) -> EngineStats:
    """What the engine has counted, read on its own thread: the step that gave the last answer is over by then.

    `worker.stats()` may be a quarter of a second older, so no test compares its counters.
    """
    found: Future[EngineStats] = Future()
    worker._send(lambda: found.set_result(worker._engine.stats()))
    return found.result(timeout_s)


def make_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny random base with a byte-level tokenizer; it is two rows wider than the tokenizer, as models are."""
    base = save_base(folder, family, **{"vocab_size": VOCAB, **changes})
    wrapped(byte_level()).save_pretrained(base)
    return base


@contextmanager
def running(base: Path, adapters: dict[str, Path], data_dir: Path, **settings: Any) -> Iterator[Service]:
    """An engine in fp32 with small pools, its adapters published for TENANT."""
    settings = {
        "dtype": "float32",
        "num_threads": 1,
        "block_size": 8,
        "memory": MemoryBudget(kv_cache=4 << 20, adapter_pool=4 << 20, host_cache=64 << 20),
        "scheduler": SchedulerSettings(max_batch_tokens=256, max_running=32),
        **settings,
    }
    store = AdapterStore.open(data_dir)
    parts = build_engine(EngineSettings(base=base, **settings), store)
    parts.worker.start()
    try:
        store.tenants.create(TENANT)
        versions = {kind: publish(store, parts, kind, folder) for kind, folder in adapters.items()}
        yield Service(parts, store, versions)
    finally:
        parts.close()
        store.close()


def publish(
    store: AdapterStore, parts: EngineParts, name: str, folder: Path, *, tenant: str = TENANT
) -> AdapterVersion:
    return store.publish(
        tenant=tenant,
        name=name,
        config=(folder / "adapter_config.json").read_bytes(),
        weights=folder / "adapter_model.safetensors",
        base=parts.base.description,
    )


def greedy_by_peft(base: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """What transformers and PEFT generate greedily, in fp32, without a cache of ours."""
    model = peft_model(base, adapter)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(range(NUM_TOKENS, VOCAB)),
        )
    return [int(token) for token in out[0, len(prompt) :]]


__all__ = [
    "NUM_TOKENS",
    "TENANT",
    "VOCAB",
    "Answer",
    "Service",
    "greedy_by_peft",
    "make_base",
    "publish",
    "running",
    "save_adapters",
    "stats_of",
]

"""An engine over recordings that the test steps by hand, with a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from server.engine.engine import Engine
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams, TokenEvent
from server.engine.schedule import SchedulerSettings
from server.engine.startup.build import EngineParts, build_engine
from server.engine.startup.settings import EngineSettings, MemoryBudget
from support.servers.service import TENANT, publish
from support.worlds.adapter_memory import FakeClock
from support.worlds.recorded_steps import record_steps

MAX_CONTEXT = 256


@dataclass
class Driven:
    """A built engine whose thread is not started. log: what each step said."""

    parts: EngineParts
    digests: dict[str, AdapterDigest]
    clock: FakeClock
    log: list[list[TokenEvent]] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    @property
    def runner(self) -> ModelRunner:
        assert isinstance(self.engine._runner, ModelRunner)
        return self.engine._runner

    def add(self, name: str, prompt: list[int], adapter: str | None = None, **params: Any) -> Request:
        deadline_s = params.pop("deadline_s", None)
        wanted = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **params})
        digest = None if adapter is None else self.digests[adapter]
        request = Request(name, TENANT, prompt, wanted, digest, adapter, deadline_s=deadline_s)
        self.engine.add(request)
        return request

    def step(self) -> list[TokenEvent]:
        self.clock.advance(1.0)
        self.log.append(self.engine.step())
        return self.log[-1]

    def drain(self) -> None:
        for _ in range(5000):
            if not self.engine.scheduler._requests and self.engine._ahead is None:
                return
            self.step()
            if self.engine.idle_s != 0.0:
                time.sleep(0.001)  # an adapter is being loaded
        raise AssertionError("never came to rest")

    def tokens(self, name: str) -> list[int]:
        return [token for _, event in self._events(name) for token in event.token_ids]

    def last(self, name: str) -> TokenEvent:
        return self._events(name)[-1][1]

    def last_step(self, name: str) -> int:
        return self._events(name)[-1][0]

    def _events(self, name: str) -> list[tuple[int, TokenEvent]]:
        return [(step, event) for step, events in enumerate(self.log) for event in events if event.request_id == name]

    @property
    def counters(self) -> dict[str, float]:
        return dict(self.engine.stats().counters)


@contextmanager
def driven(
    base: Path,
    adapters: dict[str, Path],
    data_dir: Path,
    *,
    overlaps: bool = True,
    max_tokens: int = 256,
    is_recorded: bool = True,
    **settings: Any,
) -> Iterator[Driven]:
    wishes = MemoryBudget(kv_cache=4 << 20, adapter_pool=4 << 20, host_cache=64 << 20)
    settings = {"dtype": "float32", "block_size": 8, "memory": wishes, **settings}
    settings.setdefault("scheduler", SchedulerSettings(max_batch_tokens=256, max_running=16, prompt_lookup=0))
    with closing(AdapterStore.open(data_dir)) as store:
        parts = build_engine(EngineSettings(base=base, num_threads=1, **settings), store)
        try:
            store.tenants.create(TENANT)
            digests = {kind: publish(store, parts, kind, folder).digest for kind, folder in adapters.items()}
            world = Driven(parts, digests, FakeClock())
            parts.engine.scheduler._clock = world.clock
            if is_recorded:
                record_steps(world.runner, max_rows=16, max_context=MAX_CONTEXT, max_tokens=max_tokens)
            world.runner.overlaps = overlaps
            yield world
        finally:
            parts.close()


@contextmanager
def without_and_with_drafts(
    base: Path, adapters: dict[str, Path], new_folder: Callable[[str], Path], *, most: int
) -> Iterator[list[Driven]]:
    """The same engine twice: without drafts, and with at most `most` tokens in one."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                driven(
                    base,
                    adapters,
                    new_folder("data"),
                    scheduler=SchedulerSettings(max_batch_tokens=256, max_running=16, prompt_lookup=drafts),
                    is_recorded=False,
                )
            )
            for drafts in (0, most)
        ]

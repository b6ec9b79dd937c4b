"""Tenants that send requests to a scheduler in virtual time, one of them too many. No engine: a step takes what its
`Cost` says, and every request gets its tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import NamedTuple

from server.engine.request import QueueFull, Request, SamplingParams
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.scheduler import Scheduler
from support.worlds.adapter_memory import FakeClock
from support.worlds.scheduler_bench import FakeAdapters


class Cost(NamedTuple):
    """Seconds of a step: those of an empty one, and more for each row and each token."""

    step_s: float
    row_s: float
    token_s: float

    def of(self, num_rows: int, num_tokens: int) -> float:
        return self.step_s + self.row_s * num_rows + self.token_s * num_tokens


SMALL_BASE = Cost(0.008, 0.0001, 0.00002)
SETTINGS = SchedulerSettings(max_batch_tokens=512, max_running=32, max_waiting=10_000, max_waiting_per_tenant=256)


@dataclass
class Measured:
    """Of one tenant. served: virtual tokens, an input 1 and an output 2."""

    ttfts_s: list[float] = field(default_factory=list)
    served: float = 0.0
    num_refused: int = 0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.ttfts_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Traffic:
    """rates: requests a second of each tenant. weights: 1 where not given. is_shared False: one queue for all.

    part: of the slots and of a step's tokens, where the rest of the server is busy for others, so that steps are full.
    """

    rates: Mapping[str, float]
    duration_s: float = float(os.environ.get("MULTILORA_FLOOD_S", "60"))
    warm_up_s: float = 10.0
    seed: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)
    is_shared: bool = True
    part: float = 1.0
    cost: Cost = SMALL_BASE
    max_running: int = SETTINGS.max_running
    num_blocks: int = 2048

    def run(self) -> dict[str, Measured]:
        """What each tenant measured after the warm-up."""
        self._random = random.Random(self.seed)
        self._clock = FakeClock()
        self._start_s = self._clock.now_s
        pool = BlockPool(KVCacheSettings(num_blocks=self.num_blocks, block_size=16), "sha256:base")
        settings = replace(
            SETTINGS,
            max_running=int(self.max_running * self.part),
            max_batch_tokens=int(SETTINGS.max_batch_tokens * self.part),
        )
        self._scheduler = Scheduler(settings, pool, FakeAdapters(), max_model_len=1024, clock=self._clock)
        self._measured = {tenant: Measured() for tenant in self.rates}
        self._owners: dict[str, str] = {}
        self._arrivals: list[tuple[float, str]] = []
        for tenant in self.rates:
            self._plan_next(tenant)
        while self._clock.now_s - self._start_s < self.duration_s:
            self._arrive()
            schedule = self._scheduler.schedule()
            if schedule is None:
                self._clock.now_s = max(self._clock.now_s, self._arrivals[0][0])
                continue
            self._clock.advance(self._step_s(schedule))
            self._commit(schedule)
        return self._measured

    def _step_s(self, schedule: Schedule) -> float:
        if self.part < 1.0:
            return self.cost.of(self.max_running, SETTINGS.max_batch_tokens // 2)
        return self.cost.of(len(schedule.rows), schedule.num_tokens)

    def _plan_next(self, tenant: str) -> None:
        gap_s = self._random.expovariate(self.rates[tenant])
        heappush(self._arrivals, (self._clock.now_s + gap_s, tenant))

    def _arrive(self) -> None:
        while self._arrivals[0][0] <= self._clock.now_s:
            arrival_s, tenant = heappop(self._arrivals)
            heappush(self._arrivals, (arrival_s + self._random.expovariate(self.rates[tenant]), tenant))
            self._send(tenant, arrival_s)

    def _send(self, tenant: str, arrival_s: float) -> None:
        rng = self._random
        prompt = [rng.randrange(1 << 30) for _ in range(rng.randint(16, 128))]
        params = SamplingParams(max_tokens=rng.randint(8, 64))
        request = Request(
            f"r{len(self._owners)}", tenant if self.is_shared else "all", prompt, params, arrival_s=arrival_s,
            weight=self.weights.get(tenant, 1.0),
        )  # fmt: skip
        self._owners[request.id] = tenant
        try:
            self._scheduler.add(request)
        except QueueFull:
            self._measured[tenant].num_refused += 1

    def _commit(self, schedule: Schedule) -> None:
        is_measured = self._clock.now_s - self._start_s > self.warm_up_s
        self._scheduler.commit(schedule, {row.request.id: 7 for row in schedule.rows if row.samples})
        for row in schedule.rows:
            request, measured = row.request, self._measured[self._owners[row.request.id]]
            num_prompt = max(0, min(row.start + row.num_tokens, len(request.prompt_ids)) - row.start)
            if is_measured:
                measured.served += num_prompt + 2 * (row.start + row.num_tokens >= len(request.prompt_ids))
                if len(request.output_ids) == 1 and num_prompt:
                    measured.ttfts_s.append(self._clock.now_s - request.arrival_s)
            if len(request.output_ids) >= request.params.max_tokens:
                self._scheduler.finish(request)


def others_percentile(measured: Mapping[str, Measured], flooder: str, share: float) -> float:
    """Of the times to first token of everybody but the flooder."""
    pooled = Measured([ttft for tenant, own in measured.items() if tenant != flooder for ttft in own.ttfts_s])
    return pooled.percentile(share)


def even(tenants: Sequence[str], rate: float, **other: float) -> dict[str, float]:
    return {**dict.fromkeys(tenants, rate), **other}

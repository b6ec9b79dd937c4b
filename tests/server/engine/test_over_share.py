"""What a tenant far beyond its share leaves out of a step, and what it never does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.engine.kv_blocks import BlockPool, KVCacheSettings
from server.engine.over_share import StepCost
from server.engine.request import Request
from server.engine.sampling_params import SamplingParams
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduler import Scheduler
from support.adapter_memory import FakeClock
from support.scheduler_bench import FakeGate

SETTINGS = SchedulerSettings(max_batch_tokens=256, max_running=16, reserved=0.0)
STEP_S, TOKEN_S = 0.010, 0.002


class Server:
    """The real scheduler; a step takes STEP_S and TOKEN_S for each token."""

    def __init__(self, settings: SchedulerSettings = SETTINGS) -> None:
        self.clock = FakeClock()
        pool = BlockPool(KVCacheSettings(num_blocks=1024, block_size=4), "sha256:base")
        self.scheduler = Scheduler(settings, pool, FakeGate(), max_model_len=512, clock=self.clock)
        self.num_requests = 0

    def ask(self, tenant: str, count: int = 1, *, num_prompt: int = 8) -> list[Request]:
        requests = []
        for _ in range(count):
            prompt = [1000 * self.num_requests + index for index in range(num_prompt)]
            requests.append(Request(f"r{self.num_requests}", tenant, prompt, SamplingParams(max_tokens=100)))
            self.num_requests += 1
            self.scheduler.add(requests[-1])
        return requests

    def running(self, tenant: str) -> list[Request]:
        return [request for request in self.scheduler.running() if request.tenant == tenant]

    def step(self) -> dict[str, int]:
        """Tokens of each tenant in the next forward, which runs."""
        schedule = self.scheduler.schedule()
        assert schedule is not None
        self.clock.advance(STEP_S + TOKEN_S * schedule.num_tokens)
        self.scheduler.commit(schedule, {row.request.id: 7 for row in schedule.rows if row.samples})
        return tokens_of(schedule)


def tokens_of(schedule: Schedule) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in schedule.rows:
        found[row.request.tenant] = found.get(row.request.tenant, 0) + row.num_tokens
    return found


def flooded(others: int = 3) -> Server:
    """Twelve requests of the flood decode; three other tenants have one each: four tenants, four places are a part."""
    server = Server()
    for index in range(others):
        server.ask(f"t{index}")
    server.step()
    server.ask("flood", 12)
    server.step()
    return server


def test_while_another_begins_a_flood_decodes_its_part_only_and_goes_on_afterwards() -> None:
    server = flooded()
    assert server.step() == {"t0": 1, "t1": 1, "t2": 1, "flood": 12}
    server.ask("t0", num_prompt=20)
    assert server.step() == {"t0": 1 + 20, "t1": 1, "t2": 1, "flood": 4}
    assert server.step() == {"t0": 2, "t1": 1, "t2": 1, "flood": 12}


def test_the_rows_that_go_on_are_those_admitted_first() -> None:
    server = flooded()
    flood = [request for request in server.scheduler.running() if request.tenant == "flood"]
    server.ask("t0")
    server.step()
    assert [len(request.output_ids) for request in flood] == [2] * 4 + [1] * 8


def test_a_flood_that_has_only_prompts_goes_on_while_others_begin_in_every_step() -> None:
    server = Server(replace(SETTINGS, prefill_chunk=16))
    for tenant in ("t0", "t1", "t2"):
        server.ask(tenant)
    server.step()
    long = server.ask("flood", 12, num_prompt=400)
    for _ in range(3):
        server.step()
    assert len(server.running("flood")) > 8
    for _ in range(6):
        server.ask("t1")
        tokens = server.step()
        assert tokens["t1"] > 1
        assert not any(request.output_ids for request in long)
        assert tokens["flood"] > 0


def test_a_flood_may_add_few_prompt_tokens_to_a_step_that_they_make_long() -> None:
    server = flooded()
    server.ask("flood", 4, num_prompt=200)
    assert server.step()["flood"] <= 12 + SETTINGS.max_batch_tokens // 16


def test_a_tenant_that_is_alone_gets_whole_steps() -> None:
    server = Server()
    server.ask("alone", 12)
    server.step()
    server.ask("alone", 4, num_prompt=200)
    assert server.step() == {"alone": SETTINGS.max_batch_tokens}


def test_twice_its_part_of_the_places_is_not_yet_a_flood() -> None:
    server = Server()
    for tenant in ("t0", "t1", "t2"):
        server.ask(tenant)
    server.ask("busy", 8)
    server.step()
    server.ask("t0")
    assert server.step() == {"t0": 1 + 8, "t1": 1, "t2": 1, "busy": 8}


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.010, 0.0012), (0.012, 0.00004)])
def test_the_fixed_part_of_a_step_is_read_off_its_times(fixed_s: float, token_s: float) -> None:
    cost = StepCost()
    for num_tokens in (1, 60, 12, 33, 200, 8) * 5:
        cost.observe(num_tokens, fixed_s + token_s * num_tokens)
    assert cost.tokens_of_fixed == pytest.approx(fixed_s / token_s)


def test_steps_that_are_all_alike_leave_the_last_answer() -> None:
    cost = StepCost()
    for _ in range(10):
        cost.observe(8, 0.018)
    assert cost.tokens_of_fixed is None
    for num_tokens in (1, 100) * 20:
        cost.observe(num_tokens, 0.01 + 0.001 * num_tokens)
    for _ in range(2000):
        cost.observe(8, 0.018)
        assert cost.tokens_of_fixed == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize("token_s", [0.0, -0.0001])
def test_tokens_that_seem_to_cost_nothing_set_no_limit(token_s: float) -> None:
    cost = StepCost()
    for num_tokens in (1, 100) * 5:
        cost.observe(num_tokens, 0.02 + token_s * num_tokens)
    assert cost.tokens_of_fixed is None or cost.tokens_of_fixed > 1e6

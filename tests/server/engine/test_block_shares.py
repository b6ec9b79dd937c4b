"""Blocks change hands between tenants: who gives some up, how many, and who never does."""

from __future__ import annotations

from server.engine.kv_blocks import BlockPool, KVCacheSettings
from server.engine.request import Request, Status
from server.engine.sampling_params import SamplingParams
from server.engine.schedule import SchedulerSettings
from server.engine.scheduler import Scheduler
from support.adapter_memory import FakeClock
from support.scheduler_bench import FakeGate

SETTINGS = SchedulerSettings(max_batch_tokens=512, max_running=32, watermark=0.0, reserved=0.0)
BLOCK = 16


class Server:
    """The real scheduler over 40 blocks of 16 tokens; places are never short."""

    def __init__(self) -> None:
        self.pool = BlockPool(KVCacheSettings(num_blocks=40, block_size=BLOCK), "sha256:base")
        self.clock = FakeClock()
        self.scheduler = Scheduler(SETTINGS, self.pool, FakeGate(), max_model_len=512, clock=self.clock)
        self.num_requests = 0

    def ask(
        self, tenant: str, count: int = 1, *, num_blocks: int = 4, weight: float = 1.0, max_tokens: int = 100
    ) -> list[Request]:
        """Requests whose prompts fill so many blocks but for two tokens."""
        requests = []
        for _ in range(count):
            prompt = [1000 * self.num_requests + index for index in range(num_blocks * BLOCK - 2)]
            params = SamplingParams(max_tokens=max_tokens)
            requests.append(Request(f"r{self.num_requests}", tenant, prompt, params, weight=weight))
            self.num_requests += 1
            self.scheduler.add(requests[-1])
        return requests

    def step(self) -> None:
        self.clock.advance(0.6)
        schedule = self.scheduler.schedule()
        assert schedule is not None
        self.scheduler.commit(schedule, {row.request.id: 7 for row in schedule.rows if row.samples})
        for row in schedule.rows:
            if len(row.request.output_ids) == row.request.params.max_tokens:
                self.scheduler.finish(row.request)
        self.pool.check(request.block_ids for request in self.scheduler.running())

    def running(self, tenant: str) -> list[Request]:
        return [request for request in self.scheduler.running() if request.tenant == tenant]


def flooded() -> tuple[Server, list[Request]]:
    """A flood runs in all of 40 blocks, of which ten are its part: three other tenants have just been here."""
    server = Server()
    for tenant in ("t0", "t1", "law"):
        server.ask(tenant, num_blocks=1, max_tokens=1)
    server.step()
    flood = server.ask("flood", 12)
    for _ in range(4):
        server.step()
    assert len(server.running("flood")) == 8
    assert server.pool.num_free == 0
    return server, flood


def test_a_newcomer_gets_the_blocks_of_the_floods_last() -> None:
    server, flood = flooded()
    (newcomer,) = server.ask("law")
    server.step()
    assert newcomer.status is Status.RUNNING
    assert server.running("flood") == flood[: len(server.running("flood"))]
    assert 4 <= len(server.running("flood")) < 8
    assert flood[7].status is Status.WAITING
    assert flood[7].num_preemptions == 1
    assert flood[7].output_ids  # what it has it keeps


def test_a_flood_gives_up_what_is_beyond_twice_its_part_and_no_more() -> None:
    server, _ = flooded()
    server.ask("law", 12)
    for _ in range(6):
        server.step()
    assert 15 <= sum(len(request.block_ids) for request in server.running("flood")) <= 20
    assert len(server.running("law")) >= 3


def test_a_weight_is_a_claim_to_as_much_more() -> None:
    server, _ = flooded()
    server.ask("law", 12, weight=5.0)  # twice a part of the flood is now ten
    for _ in range(6):
        server.step()
    assert sum(len(request.block_ids) for request in server.running("flood")) <= 10


def test_a_request_larger_than_what_the_flood_would_keep_waits() -> None:
    server, flood = flooded()
    (newcomer,) = server.ask("law", num_blocks=22)
    server.step()
    assert newcomer.status is Status.WAITING
    assert server.running("flood") == flood[:8]


def test_who_was_put_out_four_times_stays() -> None:
    server, flood = flooded()
    for request in flood[:8]:
        request.num_preemptions = 4
    (newcomer,) = server.ask("law")
    server.step()
    assert newcomer.status is Status.WAITING
    assert server.running("flood") == flood[:8]


def test_twice_its_part_of_the_blocks_is_nobodys_to_take() -> None:
    server = Server()
    busy = server.ask("busy", 8)
    for _ in range(4):
        server.step()
    (newcomer,) = server.ask("law")
    server.step()
    assert newcomer.status is Status.WAITING
    assert server.running("busy") == busy


def test_a_tenant_makes_no_room_for_itself() -> None:
    server, flood = flooded()
    server.ask("flood")
    server.step()
    assert server.running("flood") == flood[:8]

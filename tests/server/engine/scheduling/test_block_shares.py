"""Blocks change hands between tenants: which tenant gives some up, how many, and which never does."""

from __future__ import annotations

from server.engine.request import Request, Status
from support.worlds.block_claims import check_blocks
from support.worlds.scheduler_bench import Bench, make_bench

BLOCK = 16


def server() -> Bench:
    """The real scheduler over 40 blocks of 16 tokens; running slots are never short."""
    room = {"max_batch_tokens": 512, "max_running": 32, "reserved": 0.0}
    return make_bench(40, block_size=BLOCK, max_model_len=512, step_s=lambda schedule: 0.6, **room)


def ask(
    bench: Bench, tenant: str, count: int = 1, *, num_blocks: int = 4, weight: float = 1.0, max_tokens: int = 100
) -> list[Request]:
    """Requests whose prompts fill so many blocks but for two tokens."""
    num_prompt = num_blocks * BLOCK - 2
    return [bench.add(num_prompt, max_tokens=max_tokens, tenant=tenant, weight=weight) for _ in range(count)]


def step(bench: Bench) -> None:
    assert bench.forward() is not None
    check_blocks(bench.pool, (request.block_ids for request in bench.scheduler.running))


def flooded() -> tuple[Bench, list[Request]]:
    """A flood runs in all of 40 blocks, of which ten are its part: three other tenants have just been here."""
    bench = server()
    for tenant in ("t0", "t1", "law"):
        ask(bench, tenant, num_blocks=1, max_tokens=1)
    step(bench)
    flood = ask(bench, "flood", 12)
    for _ in range(4):
        step(bench)
    assert len(bench.running("flood")) == 8
    assert bench.pool.num_free == 0
    return bench, flood


def test_a_newcomer_gets_the_blocks_of_the_floods_last() -> None:
    bench, flood = flooded()
    (newcomer,) = ask(bench, "law")
    step(bench)
    assert newcomer.status is Status.RUNNING
    assert bench.running("flood") == flood[: len(bench.running("flood"))]
    assert 4 <= len(bench.running("flood")) < 8
    assert flood[7].status is Status.WAITING
    assert flood[7].num_preemptions == 1
    assert flood[7].output_ids  # what it has it keeps


def test_a_flood_gives_up_what_is_beyond_twice_its_part_and_no_more() -> None:
    bench, _ = flooded()
    ask(bench, "law", 12)
    for _ in range(6):
        step(bench)
    assert 15 <= sum(len(request.block_ids) for request in bench.running("flood")) <= 20
    assert len(bench.running("law")) >= 3


def test_a_weight_is_a_claim_to_as_much_more() -> None:
    bench, _ = flooded()
    ask(bench, "law", 12, weight=5.0)  # twice a part of the flood is now ten
    for _ in range(6):
        step(bench)
    assert sum(len(request.block_ids) for request in bench.running("flood")) <= 10


def test_a_request_larger_than_what_the_flood_would_keep_waits() -> None:
    bench, flood = flooded()
    (newcomer,) = ask(bench, "law", num_blocks=22)
    step(bench)
    assert newcomer.status is Status.WAITING
    assert bench.running("flood") == flood[:8]


def test_who_was_put_out_four_times_stays() -> None:
    bench, flood = flooded()
    for request in flood[:8]:
        request.num_preemptions = 4
    (newcomer,) = ask(bench, "law")
    step(bench)
    assert newcomer.status is Status.WAITING
    assert bench.running("flood") == flood[:8]


def test_twice_its_part_of_the_blocks_is_nobodys_to_take() -> None:
    bench = server()
    busy = ask(bench, "busy", 8)
    for _ in range(4):
        step(bench)
    (newcomer,) = ask(bench, "law")
    step(bench)
    assert newcomer.status is Status.WAITING
    assert bench.running("busy") == busy


def test_a_tenant_makes_no_room_for_itself() -> None:
    bench, flood = flooded()
    ask(bench, "flood")
    step(bench)
    assert bench.running("flood") == flood[:8]


def test_no_request_is_preempted_for_one_that_waits_for_a_twin() -> None:
    bench, flood = flooded()
    for request in flood[6:8]:
        bench.scheduler.finish(request)
    first, twin = ask(bench, "law", num_blocks=4), ask(bench, "law", num_blocks=4)
    twin[0].prompt_ids = list(first[0].prompt_ids)
    ask(bench, "t0", num_blocks=30, max_tokens=10)  # finds no blocks, so later requests get none that are free
    num_running = len(bench.running("flood"))
    step(bench)
    assert first[0].status is Status.RUNNING
    assert twin[0].status is Status.WAITING
    assert len(bench.running("flood")) == num_running

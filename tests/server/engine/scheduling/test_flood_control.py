"""What a tenant far beyond its share gives up of a step, and what it never does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from server.engine.request import Request
from server.engine.schedule import Schedule
from server.engine.scheduling.flood_control import StepCost
from support.worlds.scheduler_bench import Bench, make_bench

MAX_BATCH_TOKENS = 256
STEP_S, TOKEN_S = 0.010, 0.002


def step_cost(schedule: Schedule) -> float:
    return STEP_S + TOKEN_S * schedule.num_tokens


def server(*, step_s: Callable[[Schedule], float] = step_cost, **changes: float) -> Bench:
    """The real scheduler with 16 running slots; a step takes STEP_S and TOKEN_S for each token."""
    return make_bench(
        1024,
        max_model_len=512,
        step_s=step_s,
        **{"max_batch_tokens": MAX_BATCH_TOKENS, "max_running": 16, "reserved": 0.0, **changes},
    )


def ask(bench: Bench, tenant: str, count: int = 1, *, num_prompt: int = 8) -> list[Request]:
    return [bench.add(num_prompt, max_tokens=100, tenant=tenant) for _ in range(count)]


def step(bench: Bench) -> dict[str, int]:
    """Tokens of each tenant in the next forward, which runs."""
    schedule = bench.forward()
    assert schedule is not None
    found: dict[str, int] = {}
    for row in schedule.rows:
        found[row.request.tenant] = found.get(row.request.tenant, 0) + row.num_tokens
    return found


def flooded() -> Bench:
    """Twelve requests of the flood decode; three other tenants have one each: four tenants, so a share is four
    slots."""
    bench = server()
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    bench.step()
    ask(bench, "flood", 12)
    bench.step()
    return bench


def test_while_another_begins_a_flood_decodes_its_part_only_and_goes_on_afterwards() -> None:
    bench = flooded()
    assert step(bench) == {"t0": 1, "t1": 1, "t2": 1, "flood": 12}
    ask(bench, "t0", num_prompt=20)
    assert step(bench) == {"t0": 1 + 20, "t1": 1, "t2": 1, "flood": 4}
    assert step(bench) == {"t0": 2, "t1": 1, "t2": 1, "flood": 12}


def test_the_rows_that_go_on_are_those_admitted_first() -> None:
    bench = flooded()
    flood = bench.running("flood")
    ask(bench, "t0")
    step(bench)
    assert [len(request.output_ids) for request in flood] == [2] * 4 + [1] * 8


def test_a_flood_that_has_only_prompts_goes_on_while_others_begin_in_every_step() -> None:
    bench = server(prefill_chunk=16)
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    step(bench)
    long = ask(bench, "flood", 12, num_prompt=400)
    for _ in range(3):
        step(bench)
    assert len(bench.running("flood")) > 8
    for _ in range(6):
        ask(bench, "t1")
        tokens = step(bench)
        assert tokens["t1"] > 1
        assert not any(request.output_ids for request in long)
        assert tokens["flood"] > 0


def test_a_flood_may_add_few_prompt_tokens_to_a_step_that_they_make_long() -> None:
    bench = flooded()
    ask(bench, "flood", 4, num_prompt=200)
    assert step(bench)["flood"] <= 12 + MAX_BATCH_TOKENS // 16


def test_what_waits_counts_as_what_runs_does() -> None:
    """The others hold all but a few slots: the flood runs its share, and its prompts would still make steps long."""
    bench = server()
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant, 4)
    step(bench)
    ask(bench, "flood", 4)
    step(bench)
    step(bench)
    for _ in range(10):
        ask(bench, "flood", 1, num_prompt=400)
    bench.scheduler.abort(bench.running("flood")[0].id)
    tokens = step(bench)
    assert len(bench.running("flood")) == 4
    assert tokens["flood"] - 3 <= 12 / 3 + 1, "more than its share beside the others' twelve"


def test_a_flood_gets_its_share_of_the_tokens_while_others_begin_in_every_step() -> None:
    bench, given = flooded(), {"flood": 0, "others": 0}
    for count in range(200):
        for tenant in ("t0", "t1", "t2"):
            bench.add(10, max_tokens=1, tenant=tenant)
        if count % 4 == 0:
            bench.add(40, max_tokens=4, tenant="flood")
        for tenant, num_tokens in step(bench).items():
            given["flood" if tenant == "flood" else "others"] += num_tokens
    assert given["flood"] >= 0.9 * given["others"] / 3
    assert given["flood"] <= 1.3 * given["others"] / 3


def test_nothing_is_left_out_of_a_step_that_is_short_all_the_same() -> None:
    bench = server(step_s=lambda schedule: 0.010 + 0.0001 * schedule.num_tokens)
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    bench.step()
    ask(bench, "flood", 12)
    bench.step()
    ask(bench, "t0", num_prompt=20)
    assert step(bench) == {"t0": 1 + 20, "t1": 1, "t2": 1, "flood": 12}


def test_a_flood_keeps_its_part_of_the_places_and_others_may_have_the_rest() -> None:
    """t0 wants eight slots, twice its share: the level of both would be six."""
    bench = server()
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    step(bench)
    ask(bench, "flood", 30)
    step(bench)
    ask(bench, "t0", 7)
    for _ in range(10):
        step(bench)
    held = {tenant: len(bench.running(tenant)) for tenant in ("t0", "flood")}
    assert held == {"t0": 8, "flood": 6}
    ask(bench, "t1", 3)
    for _ in range(10):
        step(bench)
    held = {tenant: len(bench.running(tenant)) for tenant in ("t0", "t1", "flood")}
    assert held == {"t0": 7, "t1": 4, "flood": 4}


def test_where_most_tenants_flood_nobody_is_held_back() -> None:
    bench = server()
    for tenant in ("t0", "t1", "t2", "t3"):
        ask(bench, tenant, 12)
    step(bench)
    for _ in range(3):
        assert step(bench) == dict.fromkeys(("t0", "t1", "t2", "t3"), 4)
    for request in bench.running("t0")[:2]:
        bench.scheduler.abort(request.id)
    assert sum(step(bench).values()) >= 14 + 2 * 8


def test_a_tenant_with_two_requests_floods_nobody_however_many_tenants_there_are() -> None:
    bench = server()
    for index in range(100):
        bench.add(8, max_tokens=3, tenant=f"t{index}")
    bench.add(200, max_tokens=3, tenant="t0")
    assert max(step(bench).get("t0", 0) for _ in range(20)) > 150


def test_a_tenant_that_is_alone_gets_whole_steps() -> None:
    bench = server()
    ask(bench, "alone", 12)
    step(bench)
    ask(bench, "alone", 4, num_prompt=200)
    assert step(bench) == {"alone": MAX_BATCH_TOKENS}


def test_twice_its_part_of_the_places_is_not_yet_a_flood() -> None:
    bench = server()
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    ask(bench, "busy", 8)
    step(bench)
    ask(bench, "t0")
    assert step(bench) == {"t0": 1 + 8, "t1": 1, "t2": 1, "busy": 8}


@pytest.mark.parametrize(("empty_s", "row_s", "token_s"), [(0.010, 0.0006, 0.0003), (0.012, 0.00002, 0.00004)])
def test_what_a_step_costs_is_read_off_its_times(empty_s: float, row_s: float, token_s: float) -> None:
    cost = StepCost()
    for num_rows, num_tokens in ((1, 0), (1, 60), (12, 33), (40, 0), (40, 200), (8, 64)) * 5:
        cost.observe(num_rows, num_tokens, empty_s + row_s * num_rows + token_s * num_tokens)
    assert (cost.empty_s, cost.row_s, cost.token_s) == pytest.approx((empty_s, row_s, token_s))
    assert cost.of(10, 100) == pytest.approx(10 * row_s + 100 * token_s)


def test_rows_and_tokens_that_come_together_share_what_they_cost() -> None:
    cost = StepCost()
    for num in (1, 20, 64) * 5:
        cost.observe(num, num, 0.010 + 0.001 * 2 * num)
    assert (cost.empty_s, cost.row_s, cost.token_s) == pytest.approx((0.010, 0.001, 0.001))


def test_prompts_that_become_as_many_rows_say_nothing_about_either() -> None:
    cost = StepCost()
    for num_rows, num_tokens in ((0, 16), (16, 0), (16, 0)):
        cost.observe(num_rows, num_tokens, 0.010)
    assert cost.empty_s is None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_steps_there_are_no_cost_is_negative_or_not_finite(seed: int) -> None:
    dice, cost = random.Random(seed), StepCost()
    shapes = [(dice.randint(0, 64), dice.choice((0, 0, 16, 500))) for _ in range(dice.randint(1, 4))]
    for count in range(3000):
        cost.observe(*dice.choice(shapes), dice.choice((0.0, 1e-9, 0.01, dice.random())) if count % 7 else 0.005)
        assert all(0.0 <= value < 1e6 for value in (cost.empty_s or 0.0, cost.row_s, cost.token_s))


def test_steps_that_are_all_alike_leave_the_last_answer() -> None:
    cost = StepCost()
    for _ in range(10):
        cost.observe(8, 0, 0.018)
    assert cost.empty_s is None
    for num_tokens in (1, 100) * 20:
        cost.observe(8, num_tokens, 0.01 + 0.001 * (8 + num_tokens))
    for _ in range(10_000):
        cost.observe(8, 0, 0.018)
        assert cost.empty_s == pytest.approx(0.010, rel=0.01)


@pytest.mark.parametrize("token_s", [0.0, -0.0001])
def test_tokens_that_seem_to_cost_nothing_set_no_limit(token_s: float) -> None:
    cost = StepCost()
    for num_tokens in (1, 100) * 5:
        cost.observe(4, num_tokens, 0.02 + token_s * num_tokens)
    assert cost.token_s == pytest.approx(0.0, abs=1e-12)
    bench = server(step_s=lambda schedule: 0.02 + token_s * schedule.num_tokens)
    for tenant in ("t0", "t1", "t2"):
        ask(bench, tenant)
    step(bench)
    ask(bench, "flood", 6, num_prompt=60)
    assert step(bench)["flood"] == MAX_BATCH_TOKENS - 3

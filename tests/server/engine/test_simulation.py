"""Whole-engine simulation under invariants. MULTILORA_SIM_STEPS sets the number of steps (CI: 60,000).

`check` in support/worlds/engine_world.py asserts at every step; its fake model answers wrongly as soon as a request
reads a wrong block, slot or arena range. In some regimes a share of the requests follows a grammar or calls a tool.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace

import pytest

from server.engine.request import Request, SamplingParams
from support.worlds.adapter_memory import digest_of
from support.worlds.ahead_world import AheadSettings, AheadWorld
from support.worlds.engine_world import World, WorldSettings

NUM_STEPS = int(os.environ.get("MULTILORA_SIM_STEPS", "60000"))
CHECK_EVERY = 4  # steps between looks at every block, range and reference; what a request computes is always checked
LONGEST_WAIT_STEPS = 800  # 20 waiting, 6 running of up to 20 tokens, up to four preemptions; 509 is what was seen


REGIMES = {
    "everyday": WorldSettings(constrained=0.15, drafts=7),
    "overload": WorldSettings(arrivals=0.6, numeric_failures=0.0001),
    "too few blocks": WorldSettings(arrivals=0.35, num_blocks=17, numeric_failures=0.0, constrained=0.15, drafts=7),
    "large batches": WorldSettings(arrivals=0.6, num_blocks=80, max_running=12, max_batch_tokens=48),
    "many adapters": WorldSettings(arrivals=0.6, num_adapters=40, num_blocks=60, max_running=10, deletions=0.03),
    "host tier for two": WorldSettings(arrivals=0.4, host_elements=45, load_failures=0.0),
    "small chunks": WorldSettings(arrivals=0.4, prefill_chunk=3, constrained=0.3),
    "many aborts": WorldSettings(arrivals=0.5, aborts=0.15, load_failures=0.2, constrained=0.15, drafts=4),
    "deadlines": WorldSettings(arrivals=0.6, deadlines=0.5, num_blocks=20),
    "weights": WorldSettings(arrivals=0.6, weights=(4.0, 1.0, 0.25), num_blocks=60, max_running=8),
    "a flood": WorldSettings(arrivals=0.9, traffic=(20.0, 1.0, 1.0), deadlines=0.1),
    "keys outgrown": WorldSettings(
        arrivals=0.4, num_blocks=20, rope_switches=(9, 18), numeric_failures=0.0005, constrained=0.15, drafts=12
    ),
    "a thousand adapters": WorldSettings(arrivals=0.6, has_cycler=True, traffic=(8.0, 1.0, 1.0), num_adapters=1000),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_every_request_ends_once_with_its_own_answer_and_nothing_is_leaked(regime: str) -> None:
    world = World(seed=sum(regime.encode()), settings=replace(REGIMES[regime], check_every=CHECK_EVERY))
    for _ in range(NUM_STEPS // len(REGIMES)):
        world.step()
    world.drain()
    world.check_at_rest()
    assert world.longest_wait <= LONGEST_WAIT_STEPS
    assert min(world.outcomes["finished"], world.outcomes["abort"], world.outcomes["numerics"]) > 0, world.outcomes
    assert world.pool.stats.hit_tokens > 0
    assert world.device_pool.stats.evictions > 0
    assert world.constraints.num_whole >= world.constraints.num_given / 10
    assert world.drafts.num_right > 0 or not world.settings.drafts


@pytest.mark.parametrize("regime", ["everyday", "too few blocks", "many aborts", "deadlines", "keys outgrown"])
def test_the_same_holds_with_forwards_launched_ahead_on_a_device_that_is_behind(
    regime: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "server.engine.engine")  # a kept record holds its traceback's requests
    drafts = REGIMES[regime].drafts if regime in ("everyday", "many aborts") else 0  # fewer steps go ahead
    settings = replace(REGIMES[regime], check_every=CHECK_EVERY, numeric_failures=0.01, drafts=drafts)
    world = AheadWorld(
        seed=sum(regime.encode()), settings=settings, ahead=AheadSettings(undecided=0.03 if drafts else 0.01)
    )
    for _ in range(NUM_STEPS // 60):
        world.step()
    world.drain()
    world.check_at_rest()
    counters = world.engine.stats().counters
    assert counters["steps_ahead"] > counters["steps"] / 10
    assert world.longest_wait <= LONGEST_WAIT_STEPS
    assert min(world.outcomes["finished"], world.outcomes["abort"], world.outcomes["numerics"]) > 0, world.outcomes
    assert min(world.runner.num_undecided, world.runner.num_failed, world.num_preemptions) > 0
    assert world.device_pool.stats.evictions > 0
    assert world.constraints.num_whole >= world.constraints.num_given / 10
    assert world.drafts.num_right > 0 or not world.settings.drafts


def test_the_simulation_reaches_preemption_starvation_and_a_full_queue() -> None:
    world = World(seed=5, settings=WorldSettings(arrivals=0.6, num_blocks=17))
    for _ in range(3000):
        world.step()
    assert world.num_preemptions > 20
    assert world.num_starving_steps > 20
    assert world.outcomes["queue_full"] > 20
    assert world.outcomes["adapter_deleted"] > 0
    assert world.outcomes["adapter_too_large_for_pool"] > 0


def steps_until_a_large_adapter_runs(starvation_s: float) -> int:
    """Two small adapters that share the pool re-arrive for ever; one that needs nearly all of it asks once."""
    quiet = WorldSettings(
        arrivals=0, aborts=0, deletions=0, load_failures=0, numeric_failures=0, max_running=4,
        sizes=(8, 8, 16, 16, 60), starvation_s=starvation_s,
    )  # fmt: skip
    world = World(seed=3, settings=quiet)
    large = Request("large", "law", [1, 2, 3], SamplingParams(max_tokens=4), digest_of("a4"))
    for step in range(2000):
        if len(world.alive) < 5:
            digest = digest_of(f"a{2 + step % 2}")
            world.add(Request(f"hot{step}", "med", [step % 90], SamplingParams(max_tokens=12), digest))
        if step == 50:
            world.add(large)
        world.step()
        if large.first_scheduled_s is not None:
            return step - 50
    return 2000


def test_adapters_that_keep_arriving_do_not_lock_out_one_that_needs_their_room() -> None:
    within = steps_until_a_large_adapter_runs(starvation_s=2.0)
    assert 40 <= within <= 80  # 2 s are 40 steps; then the running ones finish
    assert steps_until_a_large_adapter_runs(starvation_s=86_400.0) == 2000


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        world = World(seed=9)
        for _ in range(1500):
            world.step()
        runs.append((dict(world.ends), world.outcomes, world.tiers.stats()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("regime", "times"), [("a flood", 2), ("a thousand adapters", 10)])
def test_the_tenant_that_sends_most_waits_longest(regime: str, times: int) -> None:
    waits: Counter[str] = Counter()
    for seed in range(11, 13):  # the longest of a run hangs on chance
        world = World(seed=seed, settings=replace(REGIMES[regime], max_waiting=200, deadlines=0.0, check_every=50))
        for _ in range(2500):
            world.step()
        waits.update(world.longest_waits)
    assert times * max(waits["med"], waits["code"]) < waits["law"], waits

"""The whole engine with idle spells, in which adapters move: requests arrive in the middle of a move, adapters are
deleted while they move, and every answer is right. What is asserted at every step stands in support/engine_world.py.
"""

from __future__ import annotations

import os

from support.worlds.engine_world import World, WorldSettings

NUM_STEPS = int(os.environ.get("MULTILORA_SIM_STEPS", "1000000")) // 50
LONGEST_COPY_TICKS = 12
IDLE_SPELLS = WorldSettings(
    arrivals=0.1,
    deletions=0.2,
    load_failures=0.0,
    num_adapters=16,
    max_slots=10,
    max_running=3,
    pool_elements=160,
    host_elements=600,
)


def test_adapters_that_move_while_nothing_runs_harm_nobody() -> None:
    world = World(seed=3, settings=IDLE_SPELLS)
    world.device.delay = lambda num_elements: world.random.randint(0, LONGEST_COPY_TICKS)
    num_met = 0
    for _ in range(NUM_STEPS):
        world.step()
        moving = {entry.digest for entry in world.device_pool.entries() if entry.moved_from is not None}
        num_met += any(request.adapter in moving for request, _ in world.alive.values())
    world.drain()
    world.check_at_rest()
    assert world.tiers.stats().moves > NUM_STEPS / 60
    assert num_met > NUM_STEPS / 400, "steps in which somebody waited for an adapter that was moving"
    assert world.outcomes["finished"] > NUM_STEPS / 20


def test_free_memory_comes_together_once_everybody_has_been_answered() -> None:
    world = World(seed=4, settings=IDLE_SPELLS)
    ratios: list[float] = []
    for _ in range(60):
        for _ in range(40):
            world.step()
        world.drain()
        ratios.append(world.tiers.stats().largest_free_ratio)
        for _ in range(40):
            world.device.tick()
            world.tiers.poll()
            world.scheduler.schedule()
            world.tiers.tidy()
        world.check()
        assert world.tiers.stats().largest_free_ratio == 1.0
    assert min(ratios) < 0.8, "memory was never fragmented"

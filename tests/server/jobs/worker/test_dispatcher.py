"""Which job starts next, and which job waits for memory: decided on rows alone, without a process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import update

from adapters_store.storage.schema import jobs as rows
from server.jobs.limits import JobLimits
from server.jobs.store.job_request import JobRequest
from server.jobs.store.records import Job, JobStatus
from server.jobs.worker.dispatcher import CHECK, ONBOARD, RESERVE_AFTER_S, Capacity, Dispatcher, choose
from support.servers.job_world import MODEL, JobWorld, data_lines

GIB = 1 << 30


class Started:
    """Sequences that were started, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, int]] = []

    def start(self, sequence: str, subject: str, number: int) -> None:
        self.log.append((sequence, subject, number))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path, limits=JobLimits(max_active_jobs=100, max_jobs_per_day=1000))
    yield world
    world.close()


def queued(world: JobWorld, tenant: str, count: int) -> list[Job]:
    jobs = [world.create(tenant, f"{tenant}{index}", salt=index) for index in range(count)]
    for job in jobs:
        world.jobs.move(job, JobStatus.QUEUED, only_in=(JobStatus.VALIDATING,))
    return [world.jobs.get(job.id) for job in jobs]


def capacity(
    *, max_running: int = 1, estimate: int = GIB, free: int | None = 4 * GIB, budget: int | None = None
) -> Capacity:
    return Capacity(max_running=max_running, estimate=lambda _: estimate, free=lambda _: free, memory_bytes=budget)


def test_a_job_that_another_executor_runs_is_left_to_a_worker_of_that_kind(world: JobWorld) -> None:
    started = Started()
    here, elsewhere = queued(world, "acme", 2)
    for job, executor in ((here, "subprocess"), (elsewhere, "ray")):
        world.jobs.move(job, JobStatus.RUNNING, only_in=(JobStatus.QUEUED,), executor=executor)
    [waiting] = queued(world, "globex", 1)
    dispatcher = Dispatcher(world.jobs, started, capacity(max_running=2, free=None))
    for _ in range(2):
        dispatcher.tick()
    assert started.log == [(ONBOARD, here.id, 1), (ONBOARD, waiting.id, 1)]
    assert world.jobs.get(waiting.id).executor == "subprocess"
    told = [text for text in world.messages(elsewhere) if "--jobs-executor ray" in text]
    assert len(told) == 1


def running(world: JobWorld) -> list[Job]:
    return world.jobs.list(statuses=(JobStatus.RUNNING,))


def test_a_tenants_many_jobs_never_stand_before_anothers_one(world: JobWorld) -> None:
    flood, one = queued(world, "acme", 20), queued(world, "globex", 1)
    first, second = choose([*flood, *one], [], {})[0], choose([*flood[1:], *one], [], {"acme": 100})[0]
    assert (first.id, second.id) == (flood[0].id, one[0].id)


def test_turns_alternate_while_both_wait(world: JobWorld) -> None:
    """Simulated: one place, a flood of thirty against ten."""
    waiting = [*queued(world, "acme", 30), *queued(world, "globex", 10)]
    last_starts: dict[str, int] = {}
    order = []
    for now in range(1, 41):
        job = choose(waiting, [], last_starts)[0]
        waiting.remove(job)
        last_starts[job.tenant] = now
        order.append(job.tenant)
    assert Counter(order[:20]) == {"acme": 10, "globex": 10}
    assert max(len(run) for run in "".join(tenant[0] for tenant in order[:20]).split("g")) <= 1


def test_only_so_many_run_at_once_and_each_is_started_once(world: JobWorld) -> None:
    jobs, started = queued(world, "acme", 4), Started()
    dispatcher = Dispatcher(world.jobs, started, capacity(max_running=2))
    for _ in range(5):
        dispatcher.tick()
    assert {job.id for job in running(world)} == {job.id for job in jobs[:2]}
    assert started.log == [(ONBOARD, job.id, 1) for job in jobs[:2]]
    world.jobs.end(running(world)[0], JobStatus.SUCCEEDED)
    dispatcher.tick()
    assert started.log[-1] == (ONBOARD, jobs[2].id, 1)


def test_new_jobs_are_checked_and_running_ones_without_a_worker_taken_up(world: JobWorld) -> None:
    new, old = world.create("acme", "new", salt=1), queued(world, "globex", 1)[0]
    world.jobs.move(old, JobStatus.RUNNING, only_in=(JobStatus.QUEUED,))
    started = Started()
    Dispatcher(world.jobs, started, capacity()).tick()
    assert sorted(started.log) == sorted([(CHECK, new.id, 1), (ONBOARD, old.id, 1)])


def test_a_job_waits_for_memory_that_a_running_one_holds(world: JobWorld) -> None:
    jobs, started = queued(world, "acme", 2), Started()
    dispatcher = Dispatcher(world.jobs, started, capacity(max_running=2, estimate=3 * GIB))
    for _ in range(3):
        dispatcher.tick()
    assert [job.id for job in running(world)] == [jobs[0].id]
    assert world.jobs.get(jobs[1].id).status is JobStatus.QUEUED
    world.jobs.end(running(world)[0], JobStatus.CANCELLED)
    dispatcher.tick()
    assert [job.id for job in running(world)] == [jobs[1].id]


LARGE_GIB, SMALL_GIB = 4, 2


def of_two_sizes(world: JobWorld, tenant: str, sizes: list[int]) -> list[Job]:
    """Queued jobs; the size in GiB is told by the rank."""
    ids = []
    for index, size in enumerate(sizes):
        file = world.upload(data_lines(salt=f"{tenant}{index}"), tenant)
        request = JobRequest(model=MODEL, training_file=file.id, suffix=f"s{index}", knobs={"rank": size})
        job = world.onboarding.create(tenant, request)
        world.jobs.move(job, JobStatus.QUEUED, only_in=(JobStatus.VALIDATING,))
        ids.append(job.id)
    return [world.jobs.get(each) for each in ids]


@dataclass
class Machine:
    """Four GiB, a clock, and a dispatcher. `pass_a_minute` ends the running job that has run longest."""

    world: JobWorld
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A worker that knows nothing but the rows."""
        sizes = Capacity(
            max_running=2,
            estimate=lambda spec: spec.adapter.rank * GIB,
            free=lambda _: None,
            memory_bytes=LARGE_GIB * GIB,
        )
        self.dispatcher = Dispatcher(self.world.jobs, Started(), sizes, clock=lambda: self.now_s)

    def pass_a_minute(self) -> list[str]:
        """The jobs that run then."""
        self.now_s += 60
        if ends := running(self.world):
            self.world.jobs.end(ends[-1], JobStatus.SUCCEEDED)
        for _ in range(2):
            self.dispatcher.tick()
        return [job.id for job in running(self.world)]


@pytest.mark.parametrize("restarts", [False, True], ids=["one worker", "a new worker every minute"])
def test_small_jobs_pass_a_large_one_for_a_bounded_time_only(world: JobWorld, restarts: bool) -> None:
    """Two small jobs always run, so that the large one of either tenant never fits between them."""
    machine, minutes = Machine(world), 0
    of_two_sizes(world, "globex", [SMALL_GIB] * 2)
    machine.pass_a_minute()
    [large, *_] = of_two_sizes(world, "acme", [LARGE_GIB, *[SMALL_GIB] * 30])
    of_two_sizes(world, "globex", [SMALL_GIB] * 30)
    while large.id not in machine.pass_a_minute():
        minutes += 1
        assert minutes < 20, "the large job starves"
        if restarts:
            machine.restart()
        assert running(world), "jobs run meanwhile"
    assert minutes >= RESERVE_AFTER_S / 60, "small jobs may pass it for a while"
    assert [job.id for job in running(world)] == [large.id]
    memory = [text for text in world.messages(large) if "memory" in text]
    assert len(memory) == 2
    assert any(f"waits for memory: it needs about {LARGE_GIB * GIB} bytes, " in text for text in memory)
    assert any("has waited for memory for 600 s" in text for text in memory)
    assert len(machine.pass_a_minute()) == 2, "small jobs run again after it"


def test_a_paused_job_reserves_nothing(world: JobWorld) -> None:
    machine = Machine(world)
    of_two_sizes(world, "globex", [SMALL_GIB] * 2)
    machine.pass_a_minute()
    [large, *_] = of_two_sizes(world, "acme", [LARGE_GIB, *[SMALL_GIB] * 30])
    for _ in range(12):
        still = machine.pass_a_minute()
    assert len(still) < 2, "it reserves"
    world.jobs.pause(large)
    assert len(machine.pass_a_minute()) == 2


def test_what_exceeds_the_budget_fails_at_once_and_reserves_nothing(world: JobWorld) -> None:
    machine = Machine(world)
    of_two_sizes(world, "globex", [SMALL_GIB])
    machine.pass_a_minute()
    [large] = of_two_sizes(world, "acme", [LARGE_GIB + 1])
    machine.dispatcher.tick()
    failure = world.jobs.get(large.id).failure
    assert failure is not None
    assert (failure.code, str(LARGE_GIB * GIB) in failure.message) == ("out_of_memory", True)


@pytest.mark.parametrize(("free", "budget"), [(4 * GIB, None), (None, 4 * GIB), (64 * GIB, 4 * GIB)])
def test_what_fits_no_empty_machine_fails_with_both_numbers_and_the_next_goes(
    world: JobWorld, free: int | None, budget: int | None
) -> None:
    jobs = queued(world, "acme", 2)
    sizes = iter([5 * GIB, GIB, GIB, GIB])
    small = Capacity(max_running=1, estimate=lambda _: next(sizes), free=lambda _: free, memory_bytes=budget)
    Dispatcher(world.jobs, Started(), small).tick()
    failed = world.jobs.get(jobs[0].id)
    assert failed.failure is not None
    assert failed.failure.code == "out_of_memory"
    assert str(5 * GIB) in failed.failure.message
    assert str(4 * GIB) in failed.failure.message
    assert [job.id for job in running(world)] == [jobs[1].id]


def test_a_spec_that_this_version_refuses_keeps_no_other_job_from_starting(world: JobWorld) -> None:
    jobs = queued(world, "acme", 2)
    with world.store.database.write() as connection:
        connection.execute(
            update(rows).where(rows.c.id == jobs[0].id).values(spec=json.dumps({"base": "b", "data": "d", "gone": 1}))
        )
    dispatcher = Dispatcher(world.jobs, Started(), capacity(max_running=2))
    for _ in range(2):
        dispatcher.tick()
    assert {job.id for job in running(world)} == {job.id for job in jobs}, "the first one's own step ends it"


def test_of_jobs_that_ended_nothing_is_remembered(world: JobWorld) -> None:
    jobs, dispatcher = queued(world, "acme", 3), Dispatcher(world.jobs, Started(), capacity(max_running=3))
    for _ in jobs:
        dispatcher.tick()
    assert len(vars(dispatcher)["_started"]) == 3
    for job in jobs:
        world.jobs.end(job, JobStatus.SUCCEEDED)
    dispatcher.tick()
    assert vars(dispatcher)["_started"] == set()


def test_the_ranks_of_a_job_take_the_memory_of_as_many_devices(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_ranks=4))
    file = world.upload(data_lines())
    job = world.onboarding.create("acme", JobRequest(model=MODEL, training_file=file.id, ranks=4))
    world.jobs.move(job, JobStatus.QUEUED, only_in=(JobStatus.VALIDATING,))
    devices = Capacity(max_running=1, estimate=lambda _: 3 * GIB, free=lambda ranks: ranks * 4 * GIB)
    Dispatcher(world.jobs, Started(), devices).tick()
    assert [each.id for each in running(world)] == [job.id]
    world.close()


def test_advice_is_part_of_the_refusal(world: JobWorld) -> None:
    job = queued(world, "acme", 1)[0]
    advising = Capacity(
        max_running=1, estimate=lambda _: GIB, free=lambda _: 1, advise=lambda spec, free: ["use qlora"]
    )
    Dispatcher(world.jobs, Started(), advising).tick()
    failure = world.jobs.get(job.id).failure
    assert failure is not None
    assert failure.message.endswith("use qlora")

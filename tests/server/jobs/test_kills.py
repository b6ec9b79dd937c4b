"""kill -9 at random moments of server, worker and trainer: every job ends once, with one registration.

MULTILORA_JOB_KILLS sets how many jobs (200 for the long form).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from server.jobs.limits import JobLimits
from server.jobs.store.records import Job, JobStatus
from support.servers.job_world import GATE, TRAINER, JobWorld

NUM_JOBS = int(os.environ.get("MULTILORA_JOB_KILLS", "6"))
FEWEST_KILLS = 2  # a fast machine is given more jobs until so many hit
MOST_KILLS = 2 * NUM_JOBS  # a slow machine, on which a process starts as slowly as they come, is then left alone
HANG_S = 1800 + 60 * NUM_JOBS
MAX_TRAINER_KILLS = 2  # of one job: after the third in a row without a step forward a job rightly fails


class Chaos:
    """A server process that is started again whenever it is dead, and someone who kills."""

    def __init__(self, world: JobWorld, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.server: subprocess.Popen[bytes] | None = None
        self.kills: Counter[str] = Counter()
        self.by_job: Counter[str] = Counter()

    def keep_up(self) -> subprocess.Popen[bytes]:
        if self.server is None or self.server.poll() is not None:
            options = ["--trainer", json.dumps(TRAINER), "--gate", json.dumps(GATE), "--max-running", "2"]
            options += ["--tick-s", "0.05", "--retry-wait-s", "0.01"]
            script = Path(__file__).parents[2] / "support" / "servers" / "job_server.py"
            command = [sys.executable, str(script), str(self.world.data_dir), *options]
            self.server = subprocess.Popen(command)
        return self.server

    def strike(self) -> None:
        server = self.keep_up()
        target = self.random.choice(("server", "worker", "trainer", "trainer"))
        if target == "server":
            server.kill()
            server.wait()
        elif target == "worker":
            pids = children(server.pid)
            if not pids:
                return
            kill(self.random.choice(pids))
        elif not self.kill_trainer():
            return
        self.kills[target] += 1

    def kill_trainer(self) -> bool:
        running = [job for job in self.world.jobs.list(statuses=(JobStatus.RUNNING,)) if self.may_be_killed(job)]
        if not running:
            return False
        job = self.random.choice(running)
        name = self.random.choice(("train", "gate"))
        try:
            pids = json.loads((job.run_dir / f"{name}.pid").read_text())
        except FileNotFoundError:
            return False
        self.by_job[job.id] += 1
        return kill(pids[self.random.choice(("group", "pid"))])

    def may_be_killed(self, job: Job) -> bool:
        return self.by_job[job.id] < MAX_TRAINER_KILLS

    def end(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait(300)


def kill(pid: int) -> bool:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def processes_of(world: JobWorld) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(world.data_dir) in line]


def test_every_job_ends_once_whoever_is_killed_when(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, limits=JobLimits(max_active_jobs=1000, max_jobs_per_day=1000))

    def create(i: int) -> Job:
        return world.create(("acme", "globex")[i % 2], f"job{i}", steps=15, step_s=0.02, salt=i)

    jobs = [create(i) for i in range(NUM_JOBS)]
    chaos = Chaos(world, seed=NUM_JOBS)
    deadline_s = time.monotonic() + HANG_S
    try:
        while world.jobs.has_work() or chaos.kills.total() < FEWEST_KILLS:
            if not world.jobs.has_work():
                jobs.append(create(len(jobs)))
            assert time.monotonic() < deadline_s, [(job.id, job.status) for job in world.jobs.list()]
            chaos.keep_up()
            time.sleep(chaos.random.uniform(0.1, 1.5))
            if chaos.kills.total() < MOST_KILLS:
                chaos.strike()
        ended = [world.jobs.get(job.id) for job in jobs]
        assert [job.failure for job in ended if job.status is not JobStatus.SUCCEEDED] == []
        for job in ended:
            versions = world.store.versions(job.tenant, job.name)
            assert [(each.version, each.digest, each.active) for each in versions] == [(1, job.adapter_digest, True)]
            assert world.messages(job).count("The job has succeeded") == 1
        assert len({job.adapter_digest for job in ended}) == len(jobs)
    finally:
        chaos.end()
        leftovers = processes_of(world)
        world.close()
    assert leftovers == []

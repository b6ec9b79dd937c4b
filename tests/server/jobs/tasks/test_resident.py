"""Tasks as forks of one resident process: as those of an executor without one, and each ends alone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.jobs.settings import JobSettings
from server.jobs.steps.gate import GATE
from server.jobs.steps.training import TRAINER
from server.jobs.tasks.executor import SubprocessExecutor, Task, TaskState, is_locked, wait_until_ended
from server.jobs.tasks.resident import PYTHON, Order, Resident, can_be_resident
from server.jobs.worker.worker import executor_for
from support.servers.waiting import wait_until
from support.source_path import SOURCE_PATH
from support.trainers.resident_task import WITH_TORCH

PROGRAM = "support.trainers.resident_task"
NICE = 5


@pytest.fixture(scope="module", autouse=True)
def program_is_found() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SOURCE_PATH)
        yield


@pytest.fixture(scope="module")
def resident(program_is_found: None) -> Iterator[Resident]:
    resident = Resident((PROGRAM,), idle_s=600, nice=NICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WITH_TORCH, "1")
        resident.open()
    yield resident
    resident.close()


@pytest.fixture
def executor(resident: Resident) -> SubprocessExecutor:
    return SubprocessExecutor(NICE, resident)


def task(folder: Path, *arguments: str, **environment: str) -> Task:
    folder.mkdir(exist_ok=True)
    return Task("train", folder, (*PYTHON, PROGRAM, *arguments), environment)


def ended(executor: SubprocessExecutor, each: Task) -> TaskState:
    assert wait_until_ended(executor, each, 600)
    return executor.state(each)


def pids_of(each: Task) -> dict[str, int]:
    return dict(json.loads(each.file("pid").read_text()))


def log_of(each: Task) -> str:
    return each.file("log").read_text()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def process_of(resident: Resident) -> int:
    assert resident._process is not None
    return resident._process.pid


def lives(pid: int) -> bool:
    """Whether it still runs: one that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_task_is_a_fork_with_what_a_process_of_its_own_has(executor: SubprocessExecutor, tmp_path: Path) -> None:
    """Threads as its environment says, its niceness, no file of another's, and random numbers that no other has."""
    told = {"OMP_NUM_THREADS": "2", "TOLD": "so"}
    forked, again, own = (task(tmp_path / name, "facts", **told) for name in ("forked", "again", "own"))
    plain = SubprocessExecutor(NICE)
    for one, each in ((executor, forked), (executor, again), (plain, own)):
        one.start(each)
    states = [ended(executor, each) for each in (forked, again, own)]
    assert states == [TaskState(is_running=False, exit_code=0)] * 3, log_of(forked)
    (*facts, drawn), (*facts_again, drawn_again), (*own_facts, _) = (
        log_of(t).splitlines() for t in (forked, again, own)
    )
    assert facts == facts_again == own_facts
    assert facts[0].split()[:2] == ["2", "1"], "two threads, one of them started by the task"
    assert not set(drawn.split()) & set(drawn_again.split())


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (("exit", "3"), 3, ""),
        (("abort",), -6, ""),
        (("raise",), 1, "RuntimeError: as the test told it"),
        (("too much",), 1, "can't allocate memory"),
    ],
)
def test_how_it_ended_is_its_own_and_the_others_go_on(
    executor: SubprocessExecutor, resident: Resident, tmp_path: Path, what: tuple[str, ...], code: int, said: str
) -> None:
    other, each = task(tmp_path / "other", "sleep", str(tmp_path / "began")), task(tmp_path / "each", *what)
    executor.start(other)
    wait_until((tmp_path / "began").exists)
    before = process_of(resident)
    executor.start(each)
    assert ended(executor, each) == TaskState(is_running=False, exit_code=code)
    assert said in log_of(each)
    assert executor.state(other).is_running
    assert process_of(resident) == before
    executor.kill(other)
    assert ended(executor, other).exit_code is None


def test_killed_it_takes_its_children_with_it(executor: SubprocessExecutor, tmp_path: Path) -> None:
    each = task(tmp_path / "each", "grandchild")
    executor.start(each)
    pids = pids_of(each)
    wait_until(lambda: children_of(pids["pid"]))
    [grandchild] = children_of(pids["pid"])
    executor.kill(each)
    ended(executor, each)
    wait_until(lambda: not any(map(lives, (*pids.values(), grandchild))))


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_started_twice_it_runs_once(executor: SubprocessExecutor, tmp_path: Path) -> None:
    each = task(tmp_path / "each", "append", str(tmp_path / "runs"))
    executor.start(each)
    SubprocessExecutor(NICE).start(each)
    ended(executor, each)
    assert (tmp_path / "runs").read_text() == "x"


def test_the_resident_process_is_killed_and_its_task_goes_on(tmp_path: Path) -> None:
    """Whoever looks next finds the task running, ends it, and starts others by another resident process."""
    code = (
        "import sys; from pathlib import Path; from server.jobs.tasks.executor import SubprocessExecutor, Task;"
        "from server.jobs.tasks.resident import Resident;"
        "one = Resident((sys.argv[1],), 600, 5); run = SubprocessExecutor(5, one);"
        "run.start(Task('train', Path(sys.argv[2]), tuple(sys.argv[3:])));"
        "print(one._process.pid, flush=True); sys.stdin.read()"
    )
    each = task(tmp_path / "each", "sleep", str(tmp_path / "began"))
    command = [sys.executable, "-c", code, PROGRAM, str(each.folder), *each.command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        process = int(worker.stdout.readline())
        wait_until((tmp_path / "began").exists)
        assert parent_of(pids_of(each)["group"]) == process
        worker.kill()
    wait_until(lambda: not lives(process))  # it ends with its worker
    next_worker = SubprocessExecutor(NICE)
    next_worker.start(each)
    assert next_worker.state(each).is_running
    assert lives(pids_of(each)["pid"]), "the task is the one that was started first"
    next_worker.kill(each)
    ended(next_worker, each)


def test_one_that_left_is_replaced_and_one_that_cannot_start_is_not_asked_again(
    executor: SubprocessExecutor, resident: Resident, tmp_path: Path
) -> None:
    before = process_of(resident)
    os.kill(before, 9)
    each = task(tmp_path / "each", "exit", "0")
    executor.start(each)
    assert ended(executor, each).exit_code == 0
    assert parent_of(process_of(resident)) == os.getpid()
    assert process_of(resident) != before

    broken = Resident(("no.such.module",), idle_s=600, nice=NICE)
    own = Task("train", tmp_path, (*PYTHON, "no.such.module"))
    plain = SubprocessExecutor(NICE, broken)
    plain.start(own)
    assert ended(plain, own).exit_code == 1
    assert "No module named" in log_of(own), "as a process of its own it says itself what is wrong"
    assert not broken.runs(own.command)


@contextmanager
def lock_and_log(folder: Path) -> Iterator[tuple[int, int]]:
    """Open files of a task, its lock taken."""
    with (folder / "train.lock").open("wb") as lock, (folder / "train.log").open("ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno(), log.fileno()


def test_an_order_whose_worker_has_ended_starts_nothing(resident: Resident, tmp_path: Path) -> None:
    order = Order(str(tmp_path), "train", PROGRAM, ["append", str(tmp_path / "runs")], {})
    reader, writer = os.pipe()
    os.close(reader)
    with lock_and_log(tmp_path) as files:
        resident._send(order, (*files, writer))
    os.close(writer)
    wait_until(lambda: not is_locked(tmp_path / "train.lock"))
    assert not (tmp_path / "runs").exists()


def test_a_task_whose_number_cannot_be_recorded_does_not_go_on(tmp_path: Path) -> None:
    """Else each attempt would leave one more task in the same folder."""
    own = Resident((PROGRAM,), idle_s=600, nice=NICE)
    order = Order(str(tmp_path / "missing"), "train", PROGRAM, ["sleep", str(tmp_path / "began")], {})
    with lock_and_log(tmp_path) as files:
        assert not own.begin(order, *files)
    wait_until(lambda: not is_locked(tmp_path / "train.lock"), timeout_s=60)


def test_it_stays_while_a_task_runs_and_leaves_after_it(tmp_path: Path) -> None:
    own = Resident((PROGRAM,), idle_s=0.5, nice=NICE)
    executor, each = SubprocessExecutor(NICE, own), task(tmp_path / "each", "sleep", str(tmp_path / "began"))
    executor.start(each)
    assert own._process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        own._process.wait(2)
    executor.kill(each)
    assert own._process.wait(600) == 0


def test_a_task_of_several_ranks_has_its_memory(tmp_path: Path) -> None:
    own = Resident((PROGRAM,), idle_s=600, nice=NICE)
    own.open()
    process = process_of(own)
    executor, each = SubprocessExecutor(NICE, own), task(tmp_path / "each", "exit", "0")
    executor.start(replace(each, ranks=2))
    assert not lives(process)
    assert own.shared_bytes() == 0
    executor.kill(each)
    ended(executor, each)


@pytest.mark.parametrize("free", ["0", "None", "1 << 50"])
def test_while_it_waits_it_leaves_if_memory_is_short(free: str) -> None:
    code = (
        "import socket; from server.jobs.tasks import resident_process as one;"
        f"one.free_host_bytes = lambda: {free};"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "print(one._is_asked(ours, 3600), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as waiting:
        if free == "0":
            assert waiting.communicate(timeout=600)[0] == "False\n"
            return
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(5)
        waiting.kill()


def test_without_a_task_it_leaves() -> None:
    idle = Resident((PROGRAM,), idle_s=0.0, nice=NICE)
    idle.open()
    assert idle._process is not None
    assert idle._process.wait(600) == 0
    assert idle.shared_bytes() == 0


@pytest.mark.parametrize(
    ("settings", "commands", "is_there"),
    [
        (JobSettings(), (TRAINER, GATE), can_be_resident()),
        (JobSettings(resident_s=0), (TRAINER, GATE), False),
        (JobSettings(), ((sys.executable, "trainer.py"), GATE), False),
        (JobSettings(), (), False),
    ],
)
def test_the_products_own_commands_have_one_unless_it_is_switched_off(
    settings: JobSettings, commands: tuple[tuple[str, ...], ...], is_there: bool
) -> None:
    executor = executor_for(settings, num_gpus=lambda: 0, commands=commands)
    assert isinstance(executor, SubprocessExecutor)
    assert (executor._resident is not None) == is_there
    if executor._resident is not None:
        executor._resident.close()

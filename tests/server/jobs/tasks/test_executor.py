"""Tasks as processes: one at a time in a folder, found again by anybody, ended with all their children."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from server.jobs.tasks.executor import SubprocessExecutor, Task, TaskState, wait_until_ended
from support.servers.waiting import wait_until


def task(folder: Path, code: str) -> Task:
    return Task("train", folder, (sys.executable, "-c", code), {"TOLD": "so"})


def ended(executor: SubprocessExecutor, each: Task) -> TaskState:
    assert wait_until_ended(executor, each, 180)
    return executor.state(each)


@pytest.mark.parametrize(
    ("code", "exit_code"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.abort()", -6)]
)
def test_how_it_ended_is_known_also_to_who_did_not_start_it(tmp_path: Path, code: str, exit_code: int) -> None:
    each = task(tmp_path, code)
    SubprocessExecutor().start(each)
    assert ended(SubprocessExecutor(), each) == TaskState(is_running=False, exit_code=exit_code)


def test_started_twice_it_runs_once(tmp_path: Path) -> None:
    each = task(
        tmp_path, "import time; open('runs', 'a').write('x'); time.sleep(0.5)".replace("runs", f"{tmp_path}/runs")
    )
    first, second = SubprocessExecutor(), SubprocessExecutor()
    first.start(each)
    wait_until((tmp_path / "runs").exists)
    second.start(each)
    ended(second, each)
    assert (tmp_path / "runs").read_text() == "x"
    second.start(each)
    ended(first, each)
    assert (tmp_path / "runs").read_text() == "xx"


def test_an_ended_task_leaves_nothing_in_its_executor(tmp_path: Path) -> None:
    each, executor = task(tmp_path, "pass"), SubprocessExecutor()
    executor.start(each)
    ended(executor, each)
    wait_until(lambda: not (executor.state(each).is_running or vars(executor)["_children"]))


def test_what_it_prints_and_its_environment(tmp_path: Path) -> None:
    each = task(tmp_path, "import os; print('told', os.environ['TOLD'])")
    executor = SubprocessExecutor()
    executor.start(each)
    ended(executor, each)
    assert "told so" in (tmp_path / "train.log").read_text()


def test_its_niceness_counts_against_other_sessions(tmp_path: Path) -> None:
    """Linux may group processes by session; then a process's niceness is weighed within its session alone."""
    code = "import os; print(os.nice(0), *(open(f).read() for f in ['/proc/self/autogroup'] if os.access(f, os.W_OK)))"
    each, executor = task(tmp_path, code), SubprocessExecutor()
    executor.start(each)
    ended(executor, each)
    said = (tmp_path / "train.log").read_text().split()
    assert said[0] == "5"
    assert said[1:] == [] or said[-2:] == ["nice", "5"]


def test_nothing_has_begun_in_an_empty_folder(tmp_path: Path) -> None:
    each = task(tmp_path, "pass")
    executor = SubprocessExecutor()
    assert executor.state(each) == TaskState(is_running=False)
    executor.stop(each)
    executor.kill(each)


SLEEP = "import time; time.sleep(60)"
GRANDCHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{SLEEP}'])"


def test_killed_it_takes_its_children_with_it(tmp_path: Path) -> None:
    each = task(tmp_path, GRANDCHILD)
    executor = SubprocessExecutor()
    executor.start(each)
    wait_until((tmp_path / "train.pid").exists)
    group = json.loads((tmp_path / "train.pid").read_text())["group"]
    executor.kill(each)
    ended(executor, each)
    wait_until(lambda: not group_lives(group))


def test_it_runs_as_long_as_the_command_lives_whoever_watches_it(tmp_path: Path) -> None:
    each = task(tmp_path, "import time; time.sleep(60)")
    executor = SubprocessExecutor()
    executor.start(each)
    wait_until((tmp_path / "train.pid").exists)
    pids = json.loads((tmp_path / "train.pid").read_text())
    os.kill(pids["group"], 9)
    assert executor.state(each).is_running
    executor.kill(each)
    assert ended(executor, each).exit_code is None


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

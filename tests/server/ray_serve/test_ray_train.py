"""A training on two nodes by Ray Train and one of two ranks by torchrun: the same numbers, bit by bit. Long form only.

MULTILORA_FLEET=long; two trainings of the demo's base with two processes each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.jobs.steps.training import TRAINER
from server.jobs.tasks.executor import Executor, SubprocessExecutor, Task, wait_until_ended
from server.jobs.tasks.ray_jobs import RayJobExecutor
from support.servers.ray_cluster import RayCluster
from support.trainers.training import demo_spec

pytestmark = pytest.mark.skipif(os.environ.get("MULTILORA_FLEET") != "long", reason="long form: MULTILORA_FLEET=long")


def result(folder: Path, executor: Executor, *, nodes: int, ranks: int) -> dict[str, Any]:
    folder.mkdir()
    spec = demo_spec(folder, sharding="fsdp", optim={"learning_rate": 1e-3, "max_steps": 4})
    (folder / "request.yaml").write_text(spec.to_yaml())
    command = (*TRAINER, str(folder / "request.yaml"), "--run-dir", str(folder))
    task = Task("train", folder, command, {"OMP_NUM_THREADS": "1"}, nodes=nodes, ranks=ranks)
    executor.start(task)
    assert wait_until_ended(executor, task, 900)
    assert executor.state(task).exit_code == 0, (folder / "train.log").read_text()[-4000:]
    body: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return body


def test_ray_train_on_two_nodes_and_torchrun_of_two_ranks_train_the_same_bits(
    cluster: RayCluster, tmp_path: Path
) -> None:
    by_ray = result(tmp_path / "ray", RayJobExecutor(cluster.jobs_url), nodes=2, ranks=1)
    by_torchrun = result(tmp_path / "torchrun", SubprocessExecutor(), nodes=1, ranks=2)
    assert (by_ray["world_size"], by_torchrun["world_size"]) == (2, 2)
    assert by_ray["losses"] == by_torchrun["losses"]

"""Trainings and gates as forks that share one base: each result is that of a process alone, whatever ends others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lora_kernels import cgroups
from server.demo.assets import demo_base_path
from server.demo.recipe.corpus import tenant_dialogues, write_jsonl
from server.jobs.tasks.executor import SubprocessExecutor, Task, wait_until_ended
from server.jobs.tasks.resident import PYTHON, Resident
from server.jobs.tasks.resident_process import Program
from support.servers.waiting import wait_until
from support.source_path import SOURCE_PATH
from trainer.model.held import HeldBase
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import Exit
from trainer.spec import TrainSpec

TRAINER, GATE, ALONE = "trainer", "server.jobs.gate", "support.trainers.trainer_alone"
STEPS = 6
SERVED = ("--device", "cpu")


@pytest.fixture(scope="module")
def executor() -> Iterator[SubprocessExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SOURCE_PATH)
        resident = Resident((TRAINER, GATE, ALONE), idle_s=600, nice=5)
        resident.open()
        yield SubprocessExecutor(5, resident)
        resident.close()


def training(root: Path, name: str, program: tuple[str, ...] = (TRAINER,), **optim: Any) -> Task:
    """A run of the same data and seed, in a folder of its own."""
    folder, data = root / name, root / "data.jsonl"
    if not data.exists():
        write_jsonl(tenant_dialogues("law", 24), data)
    folder.mkdir()
    body = {
        "base": demo_base_path(),
        "data": data,
        "adapter": {"rank": 4, "dropout": 0.1},
        "optim": {"learning_rate": 5e-3, "max_steps": STEPS, **optim},
        "batch": {"examples": 4, "max_sequence_length": 256},
        "eval_every": 2,
    }
    (folder / "request.yaml").write_text(TrainSpec.from_mapping(body).to_yaml())
    command = (*PYTHON, *program, str(folder / "request.yaml"), "--run-dir", str(folder))
    return Task("train", folder, command, {"OMP_NUM_THREADS": "1"})


def ended(executor: SubprocessExecutor, task: Task) -> int | None:
    assert wait_until_ended(executor, task, 900)
    return executor.state(task).exit_code


def adapter_of(task: Task) -> dict[str, np.ndarray]:
    return dict(load_file(task.folder / "adapter" / "adapter_model.safetensors"))


def packing_difference(task: Task) -> float:
    return next(
        float(event["packing_difference"]) for event in read_events(task.folder) if "packing_difference" in event
    )


def resumed(task: Task) -> Task:
    return Task(task.name, task.folder, (*task.command, "--resume"), task.environment)


def test_each_ends_as_if_it_were_alone(executor: SubprocessExecutor, tmp_path: Path) -> None:
    """One run diverges and one is killed and resumed beside a third: its adapter, and the resumed one's, are those of a
    run that read the base by itself. So are the gate's numbers."""
    whole, killed = training(tmp_path, "whole"), training(tmp_path, "killed")
    wild = {
        "learning_rate": 100,
        "schedule": "constant",
        "warmup_fraction": 0,
        "max_grad_norm": 1e6,
        "weight_decay": 10,
    }
    diverging = training(tmp_path, "diverging", **wild)
    for task in (whole, killed, diverging):
        executor.start(task)
    wait_until(lambda: any(event["type"] == "checkpoint" for event in read_events(killed.folder)))
    executor.kill(killed)
    assert ended(executor, killed) is None
    executor.start(resumed(killed))
    assert ended(executor, diverging) == Exit.BAD_INPUT
    assert (ended(executor, whole), ended(executor, killed)) == (Exit.SUCCEEDED, Exit.SUCCEEDED)
    alone = training(tmp_path, "alone", (ALONE, "train"))
    executor.start(alone)
    assert ended(executor, alone) == Exit.SUCCEEDED
    proved = f"proved {packing_difference(whole)!r}"
    assert alone.file("log").read_text().startswith(proved), "the runs before shared a base, proved once"
    assert packing_difference(killed) == packing_difference(whole) != packing_difference(alone)
    expected = adapter_of(alone)
    for task in (whole, killed):
        assert adapter_of(task).keys() == expected.keys()
        for name, tensor in adapter_of(task).items():
            np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6)
    assert verdict_of(executor, whole, (GATE,)) == verdict_of(executor, alone, (ALONE, "gate"))


@pytest.mark.parametrize(("copies", "keeps"), [(1, False), (3, True)])
def test_a_gate_has_the_memory_of_the_base_where_it_is_short(
    copies: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldBase.read(demo_base_path(), torch.bfloat16)
    size = (demo_base_path() / "model.safetensors").stat().st_size
    assert size / 2 < held.float32_bytes < 4 * size
    monkeypatch.setattr(cgroups, "free_host_bytes", lambda: copies * held.float32_bytes)
    assert Program.of(GATE).keeps([], held) is keeps
    assert Program.of(GATE).keeps([], None)


def verdict_of(executor: SubprocessExecutor, run: Task, program: tuple[str, ...]) -> dict[str, Any]:
    gate = Task("gate", run.folder, (*PYTHON, *program, str(run.folder), *SERVED))
    executor.start(gate)
    assert ended(executor, gate) == 0, gate.file("log").read_text()
    return dict(json.loads((run.folder / "gate.json").read_text()))

"""What a training is taken to need before it is let in; tests/trainer/test_failures.py runs one within it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.demo.assets import demo_base_path
from server.jobs.steps.memory import advice, estimated_bytes, free_bytes
from support.trainers.training import demo_spec
from trainer.planner.hardware import PROCESS_BYTES


def test_a_base_that_cannot_be_read_is_the_trainers_to_refuse(tmp_path: Path) -> None:
    spec = demo_spec(tmp_path, base=tmp_path)
    assert estimated_bytes(spec) == PROCESS_BYTES + 2 * spec.data.stat().st_size
    assert advice(spec, 1) == []


def test_advice_begins_where_the_estimate_no_longer_fits(tmp_path: Path) -> None:
    spec = demo_spec(tmp_path, base=demo_base_path())
    needed = estimated_bytes(spec)
    assert advice(spec, needed) == []
    assert advice(spec, needed - 1)[0].startswith("the run needs about ")


@pytest.mark.parametrize(
    ("visible", "ranks", "mib"),
    [
        (None, 1, 100),  # the first device, on which a training of one rank runs, whatever others have
        (None, 2, 200),
        (None, 3, None),  # the driver does not know the third
        ("1", 1, 900),
        ("1,0", 2, 200),
        ("GPU-b", 1, 900),
        ("MIG-x", 1, None),
    ],
)
def test_on_gpus_it_is_the_memory_of_the_devices_that_the_ranks_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, ranks: int, mib: int | None
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nprintf '0, GPU-a, 100\\n1, GPU-b, 900\\n2, GPU-c, [N/A]\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert free_bytes("cuda", ranks) == (None if mib is None else mib << 20)

"""What a training is taken to need before it is let in; tests/trainer/test_failures.py runs one within it."""

from __future__ import annotations

from pathlib import Path

from server.demo.assets import demo_base_path
from server.jobs.steps.memory import advice, estimated_bytes
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

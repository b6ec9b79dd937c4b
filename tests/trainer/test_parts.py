"""The loop's small parts, each alone: schedule, clipping, progress, control, event log, packing check."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.models.models import save_base
from support.trainers.training import gradients, random_examples, tiny_spec
from trainer.data.packing import Batches, BatchSettings, pack
from trainer.data.types import DataCursor, PackedBatch
from trainer.model.attention import segment_lengths
from trainer.model.model import Trainee, load
from trainer.model.packing_check import PackingBroken, check_packing
from trainer.optim import clip, learning_rate
from trainer.run_folder.control import Control
from trainer.run_folder.events import RunLog, read_events
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.progress import Progress
from trainer.spec import OptimSpec, TrainSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_through_the_warmup_and_then_follows_its_schedule(schedule: str) -> None:
    optim = OptimSpec(learning_rate=1.0, schedule=schedule, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    if schedule == "constant":
        assert set(rates[10:]) == {1.0}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.02
        assert rates[55] == pytest.approx(0.5)


def test_clipping_scales_the_joint_norm_and_tells_the_norm_before() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip(weights, 1.0) == pytest.approx(5.0)
    assert gradients(weights).norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("micro_tokens", "packing"), [(1000, True), (64, True), (32, True), (1000, False)])
def test_a_steps_gradient_does_not_depend_on_how_it_is_cut(tmp_path: Path, micro_tokens: int, packing: bool) -> None:
    trainee = load(tiny_spec(save_base(tmp_path / "b", "llama"), adapter={"init": "orthogonal", "rank": 4}), CPU)
    examples = random_examples(16, high=30)
    whole = _step_gradient(trainee, examples, BatchSettings(micro_batch_tokens=1000))
    cut = _step_gradient(trainee, examples, BatchSettings(micro_batch_tokens=micro_tokens, packing=packing))
    assert (whole - cut).norm() <= 1e-5 * whole.norm()


def _step_gradient(trainee: Trainee, examples: Any, settings: BatchSettings) -> torch.Tensor:
    step = Batches(examples, settings).at(DataCursor())
    for weight in trainee.trained():
        weight.grad = None
    for batch in step.micro_batches:
        (trainee.loss(batch) / step.weight).backward()
    return gradients(trainee.trained())


def test_progress_survives_its_mapping_and_knows_its_best() -> None:
    progress = Progress(step=7, cursor=DataCursor(1, 2), base_loss=2.0)
    for step, loss in ((1, 1.5), (2, 1.0), (3, 1.2), (4, 1.0)):
        progress = Progress(**{**vars(progress), "step": step}).with_evaluation(loss)
    assert Progress.from_mapping(json.loads(json.dumps(asdict(progress)))) == progress
    assert progress.best is not None
    assert progress.best.step == 2
    assert progress.best_steps(3) == [2, 4, 3]
    assert progress.is_stale(2)
    assert not progress.is_stale(3)
    assert not progress.is_stale(0)


def test_a_run_that_never_beats_its_base_is_stale_by_the_default_patience() -> None:
    progress = Progress(base_loss=1.0)
    for step in (11, 22, 33):
        assert not progress.is_stale(TrainSpec.model_fields["early_stopping_patience"].default)
        progress = replace(progress, step=step).with_evaluation(2 - step / 50)
    assert progress.best is not None
    assert progress.best.step == 33, "what is published is still the best there is"
    assert progress.is_stale(3)


def test_control_hears_words_and_signals_and_forgets_what_was_answered(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Control(RunFolder(tmp_path)) as control:
        assert control.requested() == ""
        (tmp_path / "control").write_text("dance")
        assert control.requested() == ""
        (tmp_path / "control").write_text("cancel\n")
        assert control.requested() == "cancel"
        control.clear()
        assert control.requested() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.requested() == "pause"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_log_drops_half_a_line_writes_no_nan_and_keeps_the_first_failure(tmp_path: Path) -> None:
    RunLog(RunFolder(tmp_path)).event("step", step=1, loss=float("nan"))
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"type": "st')
    log = RunLog(RunFolder(tmp_path))
    log.event("step", step=2, loss=1.0)
    assert [(event["step"], event["loss"]) for event in read_events(tmp_path)] == [(1, None), (2, 1.0)]
    log.failed({"code": "first", "message": "m", "param": None})
    RunLog(RunFolder(tmp_path), quiet=True).failed({"code": "second", "message": "m", "param": None})
    assert json.loads((tmp_path / "result.json").read_text())["error"]["code"] == "first"


def test_a_line_of_zeros_that_a_crash_left_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"\0" * 21 + b'\n{"type": "step"}\n')
    assert [event["type"] for event in read_events(tmp_path)] == ["step"]


def test_a_quiet_log_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(RunFolder(tmp_path), quiet=True)
    log.event("step", step=1)
    log.end("succeeded", {"status": "succeeded"})
    assert list(tmp_path.iterdir()) == []


def test_the_packing_check_passes_as_it_is_and_catches_examples_that_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = load(tiny_spec(save_base(tmp_path / "b", "qwen3")), CPU)
    examples = random_examples(4)
    assert check_packing(trainee, examples) <= 1e-5
    monkeypatch.setattr("trainer.model.model.segment_lengths", lambda position_ids: (position_ids.shape[1],))
    with pytest.raises(PackingBroken, match="packed logits differ"):
        check_packing(trainee, examples)


PLANTED = {
    "leaking mask": {"segment_lengths": lambda position_ids: (position_ids.shape[1],)},
    "wrong positions": {"pack": lambda examples: _moved(pack(examples), lambda place: (-place) % place.shape[1])},
    "another rope": {"pack": lambda examples: _moved(pack(examples), lambda place: place * 2)},
}


def _moved(batch: PackedBatch, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
    """Positions moved within each example, where there are several."""
    lengths = list(segment_lengths(batch.position_ids))
    parts = [batch.position_ids] if len(lengths) == 1 else map(move, batch.position_ids.split(lengths, 1))
    return replace(batch, position_ids=torch.cat(list(parts), 1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("planted", PLANTED)
def test_the_packing_check_catches_what_is_planted_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str, precision: str
) -> None:
    trainee = load(tiny_spec(save_base(tmp_path / "b", "llama"), precision=precision), CPU)
    for seed in range(6):
        check_packing(trainee, random_examples(3, seed=seed, low=20, high=40))
    for name, broken in PLANTED[planted].items():
        where = "trainer.model.packing_check" if name == "pack" else "trainer.model.model"
        monkeypatch.setattr(f"{where}.{name}", broken)
    with pytest.raises(PackingBroken, match="times the base's own rounding"):
        check_packing(trainee, random_examples(3, low=20, high=40))


def test_the_packing_check_catches_examples_that_are_rotated_by_anothers_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only an example behind the first ones is long."""
    trainee = load(tiny_spec(save_base(tmp_path / "b", "phi3-longrope")), CPU)
    examples = [*random_examples(5, high=20), *random_examples(1, low=60, high=70)]
    assert check_packing(trainee, examples) <= 1e-5
    for broken in (lambda segments, device: torch.zeros(1, sum(segments)), lambda segments, device: None):
        monkeypatch.setattr("trainer.model.packing_check.last_positions", broken)
        with pytest.raises(PackingBroken, match="rotated by the factors"):
            check_packing(trainee, examples)

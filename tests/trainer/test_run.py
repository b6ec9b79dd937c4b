from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from server.demo.assets import demo_base_path
from support.trainers.training import STEPS, demo_spec, trained_weights, trainer_process, wait_for_step
from trainer.data.packing import Batches
from trainer.data.types import PackedBatch
from trainer.loop import steps_between_evaluations
from trainer.model.model import Trainee
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import Exit, RunDirInUse
from trainer.spec import TrainSpec


def result_of(run_dir: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return body


def kinds(run_dir: Path) -> list[str]:
    return [event["type"] for event in read_events(run_dir)]


def assert_equal_runs(first: Path, second: Path, step: int) -> None:
    mine, theirs = trained_weights(first, step), trained_weights(second, step)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def ask_in_forward(monkeypatch: pytest.MonkeyPatch, run_dir: Path, word: str, number: int) -> list[int]:
    """Write the control file while forward `number` runs. Returns the tokens of each forward of the training."""
    forwards, whole = list[int](), Trainee.loss

    def loss(trainee: Trainee, batch: PackedBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            forwards.append(batch.num_tokens)
            if len(forwards) == number:
                (run_dir / "control").write_text(word)
        return whole(trainee, batch)

    monkeypatch.setattr(Trainee, "loss", loss)
    return forwards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of 24 steps; its folder is read only."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(demo_spec(folder), folder / "run") is Exit.SUCCEEDED
    return folder / "run"


def test_a_run_leaves_spec_events_checkpoints_adapter_and_result(finished: Path) -> None:
    result = result_of(finished)
    assert result["status"] == "succeeded"
    assert result["losses"]["best"] < 0.7 * result["losses"]["base"]
    assert TrainSpec.from_yaml(finished / "spec.yaml").optim.max_steps == STEPS
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert result["provenance"]["base_digest"].startswith("sha256:")
    assert result["provenance"]["versions"]["peft"]


def test_events_tell_every_step_and_evaluation(finished: Path) -> None:
    events = list(read_events(finished))
    steps = [event for event in events if event["type"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    assert all(event["tokens_per_s"] > 0 and event["peak_bytes"] > 1e6 and event["grad_norm"] > 0 for event in steps)
    assert steps[-1]["eta_s"] == 0
    assert [event["step"] for event in events if event["type"] == "eval"] == [0, 9, 18, STEPS]
    assert events[-1]["type"] == "succeeded"


def test_the_best_two_and_the_last_checkpoint_are_kept(finished: Path) -> None:
    evaluations = {e["step"]: e["loss"] for e in read_events(finished) if e["type"] == "eval" and e["step"]}
    best = sorted(evaluations, key=lambda step: evaluations[step])[:2]
    kept = {int(path.name.removeprefix("step-")) for path in (finished / "checkpoints").iterdir()}
    assert kept == {*best, STEPS}


def test_the_same_spec_trains_the_same_bits(finished: Path, tmp_path: Path) -> None:
    train(demo_spec(tmp_path), tmp_path / "run")
    assert_equal_runs(finished, tmp_path / "run", STEPS)


def test_a_run_killed_between_checkpoints_resumes_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    spec, run_dir = demo_spec(tmp_path), tmp_path / "run"
    process = trainer_process(spec, run_dir)
    wait_for_step(run_dir, 11)  # the checkpoint is of step 9
    process.kill()
    assert process.wait(300) == -signal.SIGKILL
    assert not (run_dir / "result.json").exists()
    assert train(spec, run_dir, resume=True) is Exit.SUCCEEDED
    assert_equal_runs(finished, run_dir, STEPS)
    assert result_of(run_dir)["losses"] == result_of(finished)["losses"]


@pytest.mark.parametrize("how", ["control file", "SIGTERM"])
def test_a_paused_run_resumes_to_the_same_bits(
    finished: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run_dir = demo_spec(tmp_path), tmp_path / "run"
    if how == "SIGTERM":
        process = trainer_process(spec, run_dir)
        wait_for_step(run_dir, 1)
        process.terminate()
        assert process.wait(300) == Exit.PAUSED
    else:
        ask_in_forward(monkeypatch, run_dir, "pause\n", 5)
        assert train(spec, run_dir) is Exit.PAUSED
    assert result_of(run_dir)["status"] == "paused"
    assert kinds(run_dir)[-2:] == ["checkpoint", "paused"]
    assert train(spec, run_dir, resume=True) is Exit.SUCCEEDED
    assert_equal_runs(finished, run_dir, STEPS)


def test_a_cancelled_run_stops_before_its_next_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "control").write_text("cancel")
    assert train(demo_spec(tmp_path), run_dir) is Exit.CANCELLED
    assert result_of(run_dir)["status"] == "cancelled"
    assert "step" not in kinds(run_dir)
    assert not (run_dir / "adapter").exists()


def test_a_finished_run_that_is_resumed_has_nothing_to_do(finished: Path) -> None:
    before = (finished / "events.jsonl").read_bytes()
    assert train(TrainSpec.from_yaml(finished / "spec.yaml"), finished, resume=True) is Exit.SUCCEEDED
    assert (finished / "events.jsonl").read_bytes() == before


def test_a_folder_with_a_run_in_it_is_not_started_again(finished: Path) -> None:
    with pytest.raises(RunDirInUse, match="--resume"):
        train(TrainSpec.from_yaml(finished / "spec.yaml"), finished)
    with pytest.raises(RunDirInUse, match="another spec"):
        train(TrainSpec.from_mapping({"base": demo_base_path(), "data": "x"}), finished, resume=True)


def test_early_stopping_ends_a_run_that_gets_worse(tmp_path: Path) -> None:
    optim = {"learning_rate": 0.3, "max_steps": 40, "schedule": "constant", "warmup_fraction": 0}
    spec = demo_spec(tmp_path, optim=optim, eval_every=1, early_stopping_patience=2)
    assert train(spec, tmp_path / "run") is Exit.SUCCEEDED
    result = result_of(tmp_path / "run")
    assert result["best_step"] < result["step"] <= result["best_step"] + 2 < 40  # the base is the first evaluation


def test_a_run_shows_life_before_its_first_step_has_ended(finished: Path) -> None:
    events = [event for event in read_events(finished) if event["type"] in ("working", "step")]
    assert [event.get("what") for event in events[:3]] == ["the held-out loss of the base", "the first step", None]
    assert events[1]["num_steps"] == STEPS
    assert {event["type"] for event in events[2:]} == {"step"}


@pytest.mark.parametrize("word", ["pause", "cancel"])
def test_a_request_is_answered_between_two_forwards_and_a_paused_run_ends_as_one_that_never_was(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """The third forward of step 4 never runs; its step is taken whole after the resume."""
    spec = TrainSpec.from_yaml(finished / "spec.yaml")
    spec = TrainSpec.from_mapping({**spec.to_mapping(), "batch": {**spec.batch.model_dump(), "packing": False}})
    forwards = ask_in_forward(monkeypatch, tmp_path / "run", word, 3 * spec.batch.examples + 2)
    assert train(spec, tmp_path / "run") is (Exit.PAUSED if word == "pause" else Exit.CANCELLED)
    assert len(forwards) == 3 * spec.batch.examples + 2
    assert result_of(tmp_path / "run")["step"] == 3
    if word == "pause":
        assert train(spec, tmp_path / "run", resume=True) is Exit.SUCCEEDED
        losses = [event["loss"] for event in read_events(tmp_path / "run") if event["type"] == "step"]
        assert len(losses) == STEPS


def test_the_steps_of_a_run_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batch.tokens, counting them cuts every epoch again: every step did so several times."""
    asked, count = list[int](), Batches.num_steps
    monkeypatch.setattr(Batches, "num_steps", lambda batches, epochs: asked.append(epochs) or count(batches, epochs))
    batch = {"tokens": 1024, "max_sequence_length": 256}
    assert train(demo_spec(tmp_path, batch=batch, optim={"epochs": 2}, eval_every=None), tmp_path / "run") == 0
    assert sorted(asked) == [1, 2]


def test_long_epochs_are_evaluated_often_enough_for_early_stopping() -> None:
    assert [steps_between_evaluations(epoch) for epoch in (1, 31, 32, 90)] == [1, 31, 11, 30]


def test_dropout_is_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"adapter": {"rank": 4, "dropout": 0.2}, "eval_every": 2, "optim": {"max_steps": 12}, "keep_best": 9}
    spec = demo_spec(tmp_path, **changes)
    train(spec, tmp_path / "whole")
    ask_in_forward(monkeypatch, tmp_path / "cut", "pause", 4)
    assert train(spec, tmp_path / "cut") is Exit.PAUSED
    torch.manual_seed(99)  # what is drawn from now on comes from the checkpoint
    train(spec, tmp_path / "cut", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
    losses = [event["loss"] for event in read_events(tmp_path / "whole") if event["type"] == "step"]
    train(demo_spec(tmp_path, **{**changes, "adapter": {"rank": 4}}), tmp_path / "dry")
    assert losses != [event["loss"] for event in read_events(tmp_path / "dry") if event["type"] == "step"]

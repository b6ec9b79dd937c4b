"""A run in MLflow (a database file) and in W&B (offline), by their real clients, by `make test-trackers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.trainers.training import demo_spec
from trainer.run import train
from trainer.run_folder.checkpoint import Checkpoints
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import PAUSE, Exit, RunFolder
from trainer.spec import SpecError

KEY = "0123456789abcdef0123456789abcdef01234567"


def paused_and_resumed(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four steps, paused after the second."""
    spec, run = demo_spec(folder, optim={"max_steps": 4}, eval_every=2, eval_samples=1), RunFolder(folder / "run")
    save = Checkpoints.save

    def save_and_pause(self: Checkpoints, *parts: object) -> Path:
        run.request(PAUSE)
        return save(self, *parts)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_pause)
        assert train(spec, run.path, track=[name]) is Exit.PAUSED
    assert train(spec, run.path, resume=True, track=[name]) is Exit.SUCCEEDED
    assert [event for event in read_events(run.path) if event["type"] == "note"] == []
    return run.path


def test_mlflow_holds_one_run_with_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # artifacts lie in the current folder
    run_dir = paused_and_resumed(tmp_path, "mlflow", monkeypatch)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("multilora")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["optim.max_steps"] == "4"
    assert str(tmp_path) not in str(run.data.params)
    steps = [event for event in read_events(run_dir) if event["type"] == "step"]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step["step"], step["loss"]) for step in steps]
    samples = [file.path for file in client.list_artifacts(run.info.run_id, "samples/1")]
    assert samples == [f"samples/1/step-{step:06d}.md" for step in (0, 2, 4)]


def test_wandb_writes_its_files_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = paused_and_resumed(tmp_path, "wandb", monkeypatch)
    files = list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    written = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in written
    assert b"held_out/loss" in written
    assert KEY.encode() not in written
    assert KEY not in "".join(capfd.readouterr()) + (run_dir / "events.jsonl").read_text()
    assert len({file.stem for file in files}) == 1  # one run


def test_wandb_without_a_key_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # or it remembers the key of the run before
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of the tester's
    with pytest.raises(SpecError, match="NoKey"):
        paused_and_resumed(tmp_path, "wandb", monkeypatch)

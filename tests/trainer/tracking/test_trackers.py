"""TensorBoard's files read by TensorBoard itself; refusals and failures of any tracker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.source_path import SOURCE_PATH
from support.trainers.training import demo_spec
from trainer.report.content import collect
from trainer.report.page import render
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import PAUSE, Exit, RunFolder
from trainer.spec import SpecError, TrainSpec
from trainer.tracking import tensorboard as tensorboard_tracker
from trainer.tracking.trackers import tracking


def shown_in(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def scalars(shown: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in shown.Scalars(name)]


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["type"] == kind]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, shown in TensorBoard, paused after the second and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    spec = demo_spec(folder, optim={"max_steps": 4}, eval_every=2, eval_samples=2)
    run = RunFolder(folder / "run")

    patch = pytest.MonkeyPatch()
    writer = tensorboard_tracker.TensorBoardTracker

    class Pausing(writer):  # type: ignore[misc, valid-type]
        def text(self, step: int, name: str, text: str) -> None:
            super().text(step, name, text)
            if step == 2:
                run.request(PAUSE)

    patch.setattr(tensorboard_tracker, "TensorBoardTracker", Pausing)
    assert train(spec, run.path, track=["tensorboard"]) is Exit.PAUSED
    patch.undo()
    assert train(spec, run.path, resume=True, track=["tensorboard"]) is Exit.SUCCEEDED
    return run.path


def test_tensorboard_reads_every_step_and_evaluation_of_a_run_that_was_paused(tracked: Path) -> None:
    shown = shown_in(tracked)
    steps = events_of(tracked, "step")
    assert scalars(shown, "train/loss") == [(e["step"], pytest.approx(e["loss"])) for e in steps]
    assert [step for step, _ in scalars(shown, "train/tokens_per_s")] == [1, 2, 3, 4]
    evaluated = [(e["step"], pytest.approx(e["loss"])) for e in events_of(tracked, "eval")]
    assert scalars(shown, "held_out/loss") == evaluated


def test_samples_are_in_events_in_tensorboard_and_in_the_report(tracked: Path) -> None:
    samples = events_of(tracked, "sample")
    assert [(sample["step"], sample["number"]) for sample in samples] == [(s, n) for s in (0, 2, 4) for n in (1, 2)]
    texts = shown_in(tracked).Tensors("samples/1/text_summary")
    assert [text.step for text in texts] == [0, 2, 4]
    assert samples[0]["answer"] in texts[0].tensor_proto.string_val[0].decode()
    report = collect(tracked, spec={"base": "b"}, gate={})
    assert [step for step, _ in report.evaluated[0]["answers"]] == [0, 2, 4]
    assert "Answers while it trained" in render(report)


def test_samples_are_transformers_own_greedy_answers_of_the_base(tracked: Path) -> None:
    """At step 0 the adapter changes nothing, so `generate` on the base is the oracle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = TrainSpec.from_yaml(tracked / "spec.yaml").base
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    sample = events_of(tracked, "sample")[0]
    ids = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
    theirs = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(theirs, skip_special_tokens=True).startswith(sample["answer"])
    assert sample["answer"]


def test_the_spec_is_shown_without_folders_of_this_machine(tracked: Path) -> None:
    (spec,) = shown_in(tracked).Tensors("spec/text_summary")
    table = spec.tensor_proto.string_val[0].decode()
    assert "| optim.max_steps | 4 |" in table
    assert str(tracked.parent) not in table


@pytest.mark.parametrize(
    ("name", "said"), [("comet", "one of tensorboard, mlflow, wandb"), ("wandb", "multilora[wandb]")]
)
def test_what_cannot_track_is_refused_before_anything_is_read(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.tracker.find_spec", lambda _: None)
    with pytest.raises(SpecError) as refused:
        train(demo_spec(tmp_path, base=tmp_path / "none"), tmp_path / "run", track=[name])
    assert said in refused.value.message
    assert not (tmp_path / "run").exists()


class Broken:
    """A client that cannot be reached, whose errors show what no event may show."""

    run_id = "abc"
    closed = False

    def __init__(self, run: object) -> None:
        pass

    def numbers(self, step: int, values: object) -> None:
        raise ConnectionError("https://user:secret@tracker.example")


@pytest.mark.parametrize("opens", [True, False])
def test_a_tracker_that_fails_is_named_without_its_address_or_key(
    opens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_broken(run: object) -> Broken:
        return Broken(run) if opens else Broken(run).numbers(0, {})  # type: ignore[return-value]

    monkeypatch.setattr(tensorboard_tracker, "TensorBoardTracker", open_broken)
    notes: list[str] = []
    folder = RunFolder(tmp_path)
    shown = tracking(["tensorboard"], folder, demo_spec(tmp_path), first_step=1, note=notes.append)
    if not opens:
        with pytest.raises(SpecError) as refused, shown:
            pass
        assert "ConnectionError" in refused.value.message
        assert "secret" not in refused.value.message
        return
    with shown as show:
        show({"type": "step", "step": 1, "loss": 1.0})
        show({"type": "step", "step": 2, "loss": 1.0})
    assert notes == ["the run is no longer tracked by tensorboard: ConnectionError"]
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"tensorboard": "abc"}


TRAINS_ALONE = """
import sys
from pathlib import Path
from support.trainers.training import demo_spec
from trainer.run import train
folder = Path(sys.argv[1])
train(demo_spec(folder, optim={"max_steps": 1}), folder / "run", track=["tensorboard"])
print("imported:", sorted({"mlflow", "wandb"} & sys.modules.keys()))
"""


def test_no_client_is_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    """In a process of its own: other tests here ask for them."""
    command = [sys.executable, "-c", TRAINS_ALONE, str(tmp_path)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SOURCE_PATH}
    )
    assert "imported: []" in done.stdout

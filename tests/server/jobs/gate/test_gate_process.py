"""Real runs through the real gate: what learned its task passes, what was broken on purpose is blocked and says why."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.demo.assets import demo_base_path
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style
from server.jobs.gate.process import Precision, gate_run, main
from support.trainers.training import base_with_a_wider_tokenizer
from support.trainers.training_data import chat, chats, write_jsonl
from trainer.gate.gate import GateResult
from trainer.gate.held_out import judge_int8
from trainer.gate.thresholds import GateThresholds
from trainer.run import train
from trainer.run_folder.folder import Exit
from trainer.spec import TrainSpec

FLOAT32 = Precision(dtype="float32")


def data_file(path: Path, *, shuffled: bool = False, count: int = 260) -> Path:
    """One-turn chats of the law tenant; shuffled: every answer behind somebody else's prompt."""
    records: list[Any] = [dialogue.record("messages") for dialogue in tenant_dialogues(Style.LAW, count, seed=5)]
    records = [record for record in records if len(record["messages"]) == 2]
    if shuffled:
        answers = [record["messages"][-1]["content"] for record in records]
        random.Random(0).shuffle(answers)
        for record, answer in zip(records, answers, strict=True):
            record["messages"][-1]["content"] = answer
    return write_jsonl(path, records)


def trained(folder: Path, *, shuffled: bool = False, rate: float = 5e-3, steps: int = 30, method: str = "lora") -> Path:
    """A finished run on the demo base. Returns its folder."""
    folder.mkdir()
    spec = TrainSpec.from_mapping(
        {
            "base": str(demo_base_path()),
            "data": str(data_file(folder / "data.jsonl", shuffled=shuffled)),
            "method": method,
            "adapter": {"rank": 4},
            "optim": {"learning_rate": rate, "max_steps": steps},
            "batch": {"examples": 8, "max_sequence_length": 256},
        }
    )
    assert train(spec, folder / "run") is Exit.SUCCEEDED
    return folder / "run"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("gate") / "good")


@pytest.fixture(scope="module")
def judged(good: Path) -> GateResult:
    """What the gate says of it; its files are in the run's folder."""
    return gate_run(good, FLOAT32)


def codes(result: GateResult) -> set[str]:
    return {reason.code for reason in result.reasons if reason.level == "block"}


def test_a_run_that_learned_its_task_passes_significantly(judged: GateResult) -> None:
    result = judged
    assert result.verdict == "pass", result.reasons
    assert result.held_out is not None
    assert result.held_out.gain.low > 0.1
    assert result.held_out.use.adapter is not None
    assert result.held_out.use.adapter.low > 0.1


@pytest.mark.usefixtures("judged")
def test_the_gate_scores_what_the_trainer_held_out(good: Path) -> None:
    gate, result = (json.loads((good / name).read_text()) for name in ("gate.json", "result.json"))
    assert gate["held_out"]["base_loss"] == pytest.approx(result["losses"]["base"], rel=1e-4)
    assert gate["held_out"]["adapter_loss"] == pytest.approx(result["losses"]["best"], rel=1e-4)
    assert gate["held_out"]["gain"]["num_examples"] == result["provenance"]["num_validation"]
    assert gate["served_as"] == {"dtype": "float32", "quantize": None, "device": "cpu"}


def test_answers_shuffled_among_their_prompts_are_blocked(tmp_path: Path) -> None:
    result = gate_run(trained(tmp_path / "shuffled", shuffled=True), FLOAT32)
    assert result.held_out is not None
    assert result.held_out.gain.is_above_zero, "the style is learned all the same: the loss alone would let it pass"
    assert codes(result) == {"ignores_prompt"}


def test_a_learning_rate_of_three_is_blocked(tmp_path: Path) -> None:
    result = gate_run(trained(tmp_path / "rate", rate=3.0, steps=3), FLOAT32)
    assert {"worse_than_base", "exploding_norm"} <= codes(result)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "nf4"), ("bfloat16", "bfloat16")])
def test_on_a_base_in_four_bits_the_adapter_is_judged_in_four_bits(
    good: Path, tmp_path: Path, dtype: str, precision: str
) -> None:
    run = copy_of(good, tmp_path / "nf4")
    result = gate_run(run, Precision(dtype=dtype, quantize="nf4"))
    assert result.verdict == "pass", result.reasons
    assert result.round_trip is not None
    assert (result.round_trip.precision, result.general is not None) == (precision, True)
    losses = json.loads((run / "result.json").read_text())["losses"]
    assert result.held_out is not None
    assert result.held_out.base_loss != pytest.approx(losses["base"], rel=1e-3), "the base was not quantized"


def test_a_base_trained_as_a_whole_is_judged_against_the_one_it_was(tmp_path: Path) -> None:
    run = trained(tmp_path / "full", method="full", rate=1e-3, steps=12)
    result = gate_run(run, FLOAT32)
    losses = json.loads((run / "result.json").read_text())["losses"]
    assert result.verdict == "pass", result.reasons
    assert result.held_out is not None
    assert result.held_out.base_loss == pytest.approx(losses["base"], rel=1e-4)
    assert result.held_out.adapter_loss == pytest.approx(losses["best"], abs=0.02)  # what is saved is bfloat16
    assert (result.spectrum, list(result.held_out.sweep)) == ([], [1.0])
    assert result.round_trip is not None
    assert result.round_trip.difference <= 1e-5
    assert "passed" in (run / "report.html").read_text()


def test_weights_that_are_not_finite_and_adapters_of_another_form_are_blocked(good: Path, tmp_path: Path) -> None:
    run = copy_of(good, tmp_path / "nan")
    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    assert codes(gate_run(run, FLOAT32)) == {"non_finite"}
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert codes(gate_run(run, FLOAT32)) == {"missing_magnitude"}
    assert json.loads((run / "gate.json").read_text())["verdict"] == "block"
    assert "the server refuses the adapter" in (run / "report.html").read_text()


def test_a_trained_adapter_in_int8_changes_the_held_out_loss_by_two_thousandths_at_most(
    good: Path, judged: GateResult, tmp_path: Path
) -> None:
    run = copy_of(good, tmp_path / "int8")
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"multilora_adapter_dtype": "int8"}))
    result = gate_run(run, FLOAT32)
    assert (result.verdict, judged.int8) == ("pass", None), result.reasons
    assert result.int8 is not None
    assert judged.held_out is not None
    assert result.int8.loss == pytest.approx(judged.held_out.adapter_loss, rel=1e-6)
    assert 0.0 < abs(result.int8.change) <= 0.002
    assert json.loads((run / "gate.json").read_text())["int8"]["change"] == result.int8.change
    assert result.round_trip is not None
    assert result.round_trip.difference <= 1e-5, "the adapter as it was trained against PEFT"
    [reason] = judge_int8(result.int8, GateThresholds(int8_change=1e-9))
    assert (reason.code, reason.level) == ("int8_changes_too_much", "block")


def copy_of(run: Path, target: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            into = target / path.relative_to(run)
            into.parent.mkdir(parents=True, exist_ok=True)
            into.write_bytes(path.read_bytes())
    return target


@pytest.mark.usefixtures("judged")
def test_the_report_holds_curves_gate_samples_and_provenance(good: Path) -> None:
    report = json.loads((good / "report.json").read_text())
    assert report["gate"] == json.loads((good / "gate.json").read_text())
    assert [step for step, _ in report["curves"]["train"]] == list(range(1, 31))
    assert report["curves"]["validation"][0][1] == pytest.approx(report["gate"]["held_out"]["base_loss"], rel=1e-4)
    assert report["result"]["provenance"]["template_digest"].startswith("sha256:")
    assert len(report["samples"]) == 6
    assert any("clause" in sample["adapter"] or "parties" in sample["adapter"] for sample in report["samples"])
    assert not any("clause" in sample["base"] for sample in report["samples"])
    page = (good / "report.html").read_text()
    assert "passed" in page
    assert report["result"]["provenance"]["data_digest"] in page


def test_data_that_changed_since_training_is_not_judged_on(good: Path, tmp_path: Path, capsys: Any) -> None:
    run = copy_of(good, tmp_path / "changed")
    spec = TrainSpec.from_yaml(run / "spec.yaml").to_mapping()
    spec["data"] = str(data_file(tmp_path / "other.jsonl", count=120))
    (run / "spec.yaml").write_text(json.dumps(spec))
    (run / "gate.json").unlink(missing_ok=True)
    assert main([str(run), "--dtype", "float32"]) == 2
    assert "data_digest" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "gate.json").exists()


def test_the_process_exits_with_zero_on_a_verdict_and_with_two_on_a_folder_that_holds_no_run(
    good: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "server.jobs.gate"]
    run = copy_of(good, tmp_path / "run")
    done = subprocess.run([*command, str(run), "--dtype", "bfloat16"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "verdict: pass"
    assert json.loads((run / "gate.json").read_text())["round_trip"]["precision"] == "bfloat16"
    assert main([str(tmp_path)]) == 2


def test_a_token_without_an_embedding_row_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*chats(20), chat("x [PAD]", "y")]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    base = base_with_a_wider_tokenizer(tmp_path / "base")
    spec = TrainSpec.from_mapping({"base": str(base), "data": str(data)})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert main([str(tmp_path), "--dtype", "float32"]) == 2
    assert "line 21: token '[PAD]' has id" in capsys.readouterr().err

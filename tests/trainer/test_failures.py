from __future__ import annotations

import errno
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.filesystem import Filesystem
from server.demo.assets import demo_base_path
from support.trainers.training import base_with_a_wider_tokenizer, demo_spec, write_chats
from support.trainers.training_data import chat, chats, write_jsonl
from trainer.__main__ import trained
from trainer.failures import failure_of
from trainer.model.model import Trainee
from trainer.model.packing_check import PackingBroken
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import Exit
from trainer.spec import TrainSpec

DATA_BYTES = 1 << 30


def test_broken_packing_is_bad_input_by_name_and_no_job_tries_it_again() -> None:
    failure = failure_of(PackingBroken("packed logits differ"))
    assert (failure.exit, failure.code, failure.param) == (Exit.BAD_INPUT, "packing_broken", "base")
    assert "batch.packing: false" in failure.message


def outcome(tmp_path: Path, spec: TrainSpec) -> tuple[Exit, dict[str, Any]]:
    """Exit code and error of a run; the last event and result.json must tell the same error."""
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    exit_code = trained(tmp_path / "spec.yaml", tmp_path / "run", resume=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    last = list(read_events(tmp_path / "run"))[-1]
    assert (result["status"], last["type"]) == ("failed", "failed")
    assert result["error"] == last["error"]
    return exit_code, result["error"]


def test_a_bad_spec_is_told_in_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("base: b\ndata: d\nrank: 4\n")
    assert trained(tmp_path / "spec.yaml", tmp_path / "run", resume=False) is Exit.BAD_INPUT
    error = json.loads((tmp_path / "run" / "result.json").read_text())["error"]
    assert (error["code"], error["param"]) == ("unknown_field", "rank")


@pytest.mark.parametrize(
    ("status", "resume", "kept"), [("paused", True, False), ("succeeded", True, True), ("paused", False, True)]
)
def test_a_resumed_start_that_fails_early_replaces_what_the_earlier_one_said(
    tmp_path: Path, status: str, resume: bool, kept: bool
) -> None:
    """Its readers took the old result for the new one: a sharded job resumed from a pause without end."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"status": status, "exit_code": 3}))
    (folder / "events.jsonl").write_text('{"type": "paused"}\n{"type": "st')
    (tmp_path / "spec.yaml").write_text("base: b\ndata: d\nrank: 4\n")
    assert trained(tmp_path / "spec.yaml", folder, resume=resume) is Exit.BAD_INPUT
    assert json.loads((folder / "result.json").read_text())["status"] == (status if kept else "failed")
    assert [event["type"] for event in read_events(folder)] == (["paused"] if kept else ["paused", "failed"])


@pytest.mark.parametrize("field", ["data", "validation", "mix"])
def test_a_file_of_which_every_example_is_dropped_is_named(tmp_path: Path, field: str) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [chat(f"Say {n}.", "word " * 300) for n in range(20)])
    batch = {"max_sequence_length": 100, "too_long": "drop"}
    validation = {"validation": write_jsonl(tmp_path / "v.jsonl", chats(5))} if field == "data" else {}
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, batch=batch, **{**validation, field: long}))
    assert (exit_code, error["code"], error["param"]) == (Exit.BAD_INPUT, "too_few_examples", field)
    assert "all have more than 100 tokens" in error["message"]


def test_data_that_is_a_folder_is_bad_input(tmp_path: Path) -> None:
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, data=tmp_path))
    assert (exit_code, error["code"]) == (Exit.BAD_INPUT, "file_not_found")


def test_a_held_out_loss_that_is_not_finite_is_no_best_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is less than nothing and more than nothing: the first evaluation stayed the best one, and was published."""
    whole = Trainee.loss
    monkeypatch.setattr(Trainee, "loss", lambda *given: whole(*given) * (torch.nan if overflows(given[0]) else 1.0))

    def overflows(trainee: Trainee) -> bool:
        return not torch.is_grad_enabled() and any(bool(weight.any()) for weight in trainee.trained()[1::2])

    exit_code, error = outcome(tmp_path, demo_spec(tmp_path))
    assert (exit_code, error["code"]) == (Exit.BAD_INPUT, "diverged")
    assert "step 9: held-out loss nan" in error["message"]


def test_bad_data_is_told_with_its_line(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "data.jsonl")
    data.write_text(data.read_text() + '{"messages": []}\n')
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path))
    assert exit_code is Exit.BAD_INPUT
    assert error["param"] == "data"
    assert "line 49" in error["message"]


def test_a_token_without_an_embedding_row_is_told_with_its_line(tmp_path: Path) -> None:
    base = base_with_a_wider_tokenizer(tmp_path / "base")
    assert train(demo_spec(tmp_path, base=base), tmp_path / "sound") is Exit.SUCCEEDED
    data = write_chats(tmp_path / "data.jsonl")
    turns = [{"role": "user", "content": "x [PAD]"}, {"role": "assistant", "content": "y"}]
    data.write_text(data.read_text() + json.dumps({"messages": turns}) + "\n")
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, base=base))
    assert (exit_code, error["code"], error["param"]) == (Exit.BAD_INPUT, "token_without_embedding", "data")
    assert re.search(r"line 49: token '\[PAD\]' has id (\d+), the base has \1 embedding rows", error["message"])


def test_missing_data_is_bad_input(tmp_path: Path) -> None:
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, data=tmp_path / "none.jsonl"))
    assert (exit_code, error["code"]) == (Exit.BAD_INPUT, "file_not_found")
    assert "none.jsonl" in error["message"]


def test_a_base_without_a_tokenizer_is_bad_input(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(demo_base_path() / name, base)
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, base=base))
    assert (exit_code, error["code"], error["param"]) == (Exit.BAD_INPUT, "unsupported_base", "base")


def test_a_base_that_holds_nan_is_bad_input_and_not_the_trainers_fault(tmp_path: Path) -> None:
    base = shutil.copytree(demo_base_path(), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "input_layernorm" in name)
    weights[name][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, base=base))
    assert (exit_code, error["code"], error["param"]) == (Exit.BAD_INPUT, "unsupported_base", "base")
    assert "not finite before training" in error["message"]


def test_a_run_that_diverges_is_ended_and_not_tried_again(tmp_path: Path) -> None:
    optim = {"learning_rate": 100, "max_steps": 30, "schedule": "constant", "warmup_fraction": 0, "max_grad_norm": 1e6}
    exit_code, error = outcome(tmp_path, demo_spec(tmp_path, optim={**optim, "weight_decay": 10}, eval_every=100))
    assert (exit_code, error["code"], error["param"]) == (Exit.BAD_INPUT, "diverged", "optim.learning_rate")


def in_little_memory(spec: TrainSpec, run_dir: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a run that may hold a little more than what it needs to start."""
    run_dir.mkdir()
    (run_dir / "wanted.yaml").write_text(spec.to_yaml())
    command = [sys.executable, "-m", "trainer", str(run_dir / "wanted.yaml"), "--run-dir", str(run_dir)]
    process = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES)),
    )
    return process.returncode, json.loads((run_dir / "result.json").read_text())


def test_running_out_of_memory_names_a_setting_that_fits_the_memory_there_is(tmp_path: Path) -> None:
    """A real refusal of the system, and the run that its message asks for instead."""
    write_chats(tmp_path / "data.jsonl", 300)
    batch = {"examples": 300, "max_sequence_length": 256, "micro_tokens": 1 << 16}
    optim = {"max_steps": 1}
    code, result = in_little_memory(demo_spec(tmp_path, batch=batch, optim=optim), tmp_path / "run")
    error = result["error"]
    assert (code, error["code"], error["param"]) == (Exit.FAILED, "out_of_memory", "batch.micro_tokens"), result
    assert "1.0 GiB are available" in error["message"]
    advised = re.search(r"batch\.micro_tokens (\d+) instead of 65536 [^:]*: (0\.\d) GiB", error["message"])
    assert advised is not None, error["message"]
    smaller = {**batch, "micro_tokens": int(advised[1])}
    code, result = in_little_memory(demo_spec(tmp_path, batch=smaller, optim=optim), tmp_path / "smaller")
    assert (code, result["status"]) == (Exit.SUCCEEDED, "succeeded"), result


class FullDisk(Filesystem):
    """The disk is full from the moment the checkpoint of step 18 is put in place."""

    def sync_file(self, path: Path) -> None:
        if "step-000018" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().sync_file(path)


def test_a_full_disk_ends_as_a_clear_failure_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    spec, run_dir = demo_spec(tmp_path), tmp_path / "run"
    with pytest.raises(OSError, match="No space") as caught:
        train(spec, run_dir, files=FullDisk())
    failure = failure_of(caught.value)
    assert (failure.exit, failure.code) == (Exit.FAILED, "disk_full")
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-000009"]
    assert train(spec, run_dir, resume=True) is Exit.SUCCEEDED
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_an_error_of_safetensors_about_a_full_disk_is_a_full_disk() -> None:
    from safetensors import SafetensorError

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert failure_of(error).code == "disk_full"


def test_an_unknown_error_is_told_by_its_kind() -> None:
    failure = failure_of(ZeroDivisionError("division by zero\nand more"))
    assert (failure.exit, failure.code) == (Exit.FAILED, "internal_error")
    assert failure.message == "ZeroDivisionError: division by zero"

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import Result

from server.cli.common.output import Output
from server.cli.training.train import Screen
from support.trainers.training import demo_spec
from trainer.run_folder.folder import RunFolder

Command = Callable[..., Result]
MULTILORA = Path(sys.executable).with_name("multilora")


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(demo_spec(tmp_path).to_yaml())
    return path


def test_train_tells_every_event_and_the_result(run: Command, spec_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("train", spec_file, "--run-dir", folder, "--no-gate", "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines if line["type"] == "step"] == list(range(1, 25))
    assert lines[-1]["type"] == "result"
    assert lines[-1]["status"] == "succeeded"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    again = run("train", spec_file, "--run-dir", folder, "--json")
    assert again.exit_code == 5
    assert json.loads(again.stdout.splitlines()[-1])["error"]["code"] == "run_dir_in_use"


def test_a_bad_spec_is_refused_before_anything_starts(run: Command, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("base: b\ndata: d\nadapter: {rank: 1000}\n")
    done = run("train", bad, "--run-dir", tmp_path / "run", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["error"]["message"].startswith("adapter.rank: must be a whole number from 1 to 256")
    assert not (tmp_path / "run").exists()


def test_several_ranks_need_a_sharded_spec(run: Command, spec_file: Path) -> None:
    done = run("train", spec_file, "--ranks", "2")
    assert done.exit_code == 4
    assert "fsdp" in done.output


def test_the_trainers_refusal_is_told_as_the_commands_own(run: Command, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    missing.write_text(demo_spec(tmp_path, data=tmp_path / "none.jsonl").to_yaml())
    done = run("train", missing, "--run-dir", tmp_path / "run", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "file_not_found"


def test_without_a_reader_of_its_output_the_run_pauses(tmp_path: Path) -> None:
    """As `multilora train SPEC --json | head -1`: no trainer is left behind, and --resume resumes the run."""
    spec, folder = tmp_path / "long.yaml", tmp_path / "run"
    spec.write_text(demo_spec(tmp_path, optim={"epochs": 1000}).to_yaml())
    command = [MULTILORA, "train", spec, "--run-dir", folder, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
    assert RunFolder(folder).result()["status"] == "paused"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_a_trainer_that_hangs(tmp_path: Path, ranks: int) -> None:
    spec, folder = tmp_path / "long.yaml", tmp_path / "run"
    sharding = {"sharding": "fsdp"} if ranks > 1 else {}
    spec.write_text(demo_spec(tmp_path, optim={"epochs": 1000}, **sharding).to_yaml())
    command = [MULTILORA, "train", spec, "--run-dir", folder, "--ranks", str(ranks), "--json"]
    trainers: list[psutil.Process] = []
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            lines = map(json.loads, process.stdout)
            next(line for line in lines if line["type"] == "step")
            trainers = psutil.Process(process.pid).children(recursive=True)
            for trainer in trainers:
                trainer.suspend()  # so it hangs
            process.send_signal(signal.SIGINT)
            warning = next(line for line in lines if line["type"] == "note" and "Ctrl-C" in line["message"])
            process.send_signal(signal.SIGINT)
            *_, last = lines
        psutil.wait_procs(trainers, timeout=60)
        assert not [each for each in trainers if each.is_running()]
    finally:
        for trainer in trainers:
            with suppress(psutil.NoSuchProcess):
                trainer.kill()
    assert "second Ctrl-C" in warning["message"]
    assert last["error"]["code"] == "interrupted"
    assert process.returncode == 130
    assert RunFolder(folder).requested() == "", "a resumed run would pause at once"


def test_a_held_out_loss_that_is_not_finite_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no such number, so an event holds null: after a step too large the held-out loss may overflow."""
    with Screen(Output()) as screen:
        screen.show([{"type": "eval", "step": 3, "loss": None, "base_loss": 2.0}])
    assert "step 3: held-out unknown" in capsys.readouterr().out

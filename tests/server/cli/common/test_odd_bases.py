"""Every command that opens a base, on folders that are none: each says what it is and the way out, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.base.files import describe_base
from adapters_store.base.weights import load_causal
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.process import main as gate_main
from server.jobs.steps.gate import GATE
from server.jobs.steps.training import TRAINER
from support.models.odd_bases import MODULES, ODD, SOUND, add_code
from support.trainers.training import write_chats
from trainer.__main__ import trained

Command = Callable[..., Any]
ROOT = Path(__file__).parents[4]
IDS = [[1, 5, 9, 200, 7, 3]]
EVERY_COMMAND = ("adapter-beside-the-base", "pickled", "tensor-missing", "shards-lost", "own-architecture")


@pytest.fixture
def folder(base: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A sound base that brings code; a test spoils it further."""
    copy = copy_of(base)
    add_code(copy)
    return copy


@pytest.fixture(autouse=True)
def _nobody_is_asked_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*_: object) -> str:
        raise AssertionError("a question to the terminal")

    monkeypatch.setattr("builtins.input", refuse)
    yield
    assert not list(tmp_path.glob("**/the-folders-code-ran")), "code of the folder has run"


def _served(run: Command, folder: Path) -> str:
    result = run("serve", "--base", folder, "--port", "0", "--threads", "1")
    assert result.exit_code == 6
    assert result.stderr.startswith("unsupported_base: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return str(result.stderr)


def _looked_at(run: Command, folder: Path) -> str:
    result = run("doctor", "--base", folder, "--port", "0", "--json")
    assert result.exit_code == 1
    return str(next(check["found"] for check in json.loads(result.stdout)["checks"] if check["name"] == "base"))


def _run_dir(folder: Path) -> Path:
    """A run that was asked for on the folder."""
    run_dir = folder.parent / "run"
    run_dir.mkdir(exist_ok=True)
    spec = {"base": str(folder), "data": str(write_chats(run_dir / "data.jsonl")), "optim": {"max_steps": 1}}
    (run_dir / "spec.yaml").write_text(json.dumps(spec))
    return run_dir


def _trained(folder: Path) -> str:
    run_dir = _run_dir(folder)
    assert trained(run_dir / "spec.yaml", run_dir / "out", resume=False) == 2
    error = json.loads((run_dir / "out" / "result.json").read_text())["error"]
    assert (error["code"], error["param"]) == ("unsupported_base", "base")
    return str(error["message"])


def _gated(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert gate_main([str(_run_dir(folder))]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("UnsupportedBase: ")
    return last


@pytest.mark.parametrize("name", ODD)
def test_a_folder_that_is_no_base_says_what_it_is(
    run: Command, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ODD[name]
    odd.make(folder)
    told = {"serve": _served(run, folder), "doctor": _looked_at(run, folder)}
    if odd.place != "serving":
        told |= {"train": _trained(folder), "gate": _gated(folder, capsys)}
    for command, text in told.items():
        assert [word for word in odd.words if word not in text] == [], f"{command} says: {text}"
        assert "trust_remote_code" not in text
    planned = run("plan", "serve", "--model", folder)
    assert planned.exit_code in (0, 4), planned.output


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_the_commands_around_adapters_say_the_same(
    run: Command, base: Path, adapter: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    run("tenant", "create", "acme")
    pushed = run("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)
    assert pushed.exit_code == 0, pushed.output
    ODD[name].make(folder)
    data = write_chats(tmp_path / "data.jsonl")
    for arguments in (
        ("adapter", "push", adapter, "-t", "acme", "-n", "other", "--base", folder),
        ("adapter", "merge", "law", "-t", "acme", "--base", folder, "--out", tmp_path / "out"),
        ("onboard", data, "-t", "acme", "-n", "new", "--base", folder),
    ):
        result = run(*arguments)
        assert result.exit_code == 6, result.output
        assert [word for word in ODD[name].words if word not in result.stderr] == [], result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_base_that_brings_code_answers_as_it_does_without(folder: Path, base: Path, name: str) -> None:
    SOUND[name](folder)
    assert describe_base(folder).modules == describe_base(base).modules
    models = [load_causal(each, torch.float32, torch.device("cpu")) for each in (folder, base)]
    logits = [model(torch.tensor(IDS)).logits for model in models]
    assert torch.equal(*logits)
    tokenizers = [Tokenizer.load(each) for each in (folder, base)]
    assert tokenizers[0].encode("The lease ends.") == tokenizers[1].encode("The lease ends.")
    assert tokenizers[0].has_chat_template is (name != "no-template")


def test_the_traps_work(base: Path, copy_of: Callable[[Path], Path]) -> None:
    """Each would make the marker if it were run; the marker is taken away again."""
    folder = copy_of(base)
    marker = add_code(folder)
    for name in MODULES:
        subprocess.run([sys.executable, folder / name], check=True)
        marker.unlink()
    pickle.loads((folder / "training_args.bin").read_bytes())
    marker.unlink()


@pytest.mark.parametrize("name", ["own-architecture", "tokenizer-of-its-own"])
def test_a_blind_yes_in_a_terminal_runs_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    ODD[name].make(folder)
    command = [str(Path(sys.executable).with_name("multilora")), "serve", "--base", str(folder), "--port", "0"]
    code, shown = _in_a_terminal([*command, "--data-dir", str(tmp_path / "data")], typed=b"y\n")
    assert code == 6, shown
    assert "unsupported_base: " in shown
    assert "[y/N]" not in shown


def _in_a_terminal(command: list[str], *, typed: bytes) -> tuple[int, str]:
    """Runs it with a terminal of its own, typing all the time. Its exit code and all that it has shown."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    os.set_blocking(terminal, False)
    shown, end_s = b"", time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < end_s, shown
        try:
            shown += os.read(terminal, 65536)
            os.write(terminal, typed)
        except BlockingIOError:
            os.write(terminal, typed)
        except OSError:  # it has closed its side
            pass
        time.sleep(0.05)
    while chunk := _rest(terminal):
        shown += chunk
    os.close(terminal)
    return os.waitstatus_to_exitcode(ended[1]), " ".join(shown.decode(errors="replace").split())


def _rest(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_a_training_started_in_a_models_folder_takes_no_module_of_it(tmp_path: Path) -> None:
    """`python -m` looks in the current folder first, unless it is told not to."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "transformers", "trainer", "server", "yaml", "secrets"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'the-folders-code-ran')!r}, 'w').close()\n")
    run_dir = _run_dir(tmp_path / "no-base")
    spec = {**json.loads((run_dir / "spec.yaml").read_text()), "sharding": "fsdp"}
    (run_dir / "spec.yaml").write_text(json.dumps(spec))
    command = [Path(sys.executable).with_name("multilora"), "train", run_dir / "spec.yaml", "--ranks", 2]
    words = [str(each) for each in command]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "no config.json there" in done.stderr
    assert all("-P" in command for command in (TRAINER, GATE))


CONVERTING = ("converted/convert.py", "converted/text_side.py")


def test_bases_are_opened_in_one_place_only() -> None:
    """transformers' loaders ask, and read pickles, if they are not told otherwise: only these modules call them."""
    loaders = re.compile(r"\b(?!PeftModel)\w+\.from_pretrained\(")
    makers_of_assets = {"server/demo/recipe/make_adapters.py"}  # run by hand, on the demo's own base
    found = {
        str(path.relative_to(ROOT))
        for part in ("server", "trainer", "adapters_store", "kernels")
        for path in (ROOT / part).rglob("*.py")
        if loaders.search(path.read_text()) or ").from_pretrained(" in path.read_text()
    }
    opening = {"files.py", *CONVERTING, "tensors.py", "tokenizer.py", "weights.py"}
    by_parts = "server/engine/tensor_parallel/part_loader.py"
    assert found - makers_of_assets == {by_parts, *(f"adapters_store/base/{name}" for name in opening)}
    assert "model_class(config).from_pretrained(\n            None," in (ROOT / by_parts).read_text(), (
        "it reads the files"
    )
    for name in ("files.py", *CONVERTING, "tokenizer.py"):
        calls = re.findall(
            r"= (?:Auto\w+|PreTrainedTokenizerFast)\.from_pretrained\([^)]*\)",
            (ROOT / "adapters_store" / "base" / name).read_text(),
        )
        assert calls
        assert all("trust_remote_code=False" in call and "local_files_only=True" in call for call in calls)

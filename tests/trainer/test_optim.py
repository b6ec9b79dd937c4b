"""8-bit moments: bitsandbytes' own AdamW, learning as float32 does, resumed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.trainers.training import demo_spec, trained_weights
from trainer.optim import make_optimizer
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import PAUSE, Exit, RunFolder
from trainer.spec import OptimSpec, SpecError, TrainSpec

RANK = {"adapter": {"rank": 64}}  # its factors have 4,096 elements and more: smaller ones keep float32 moments


def spec(folder: Path, moments: str) -> TrainSpec:
    optim = {"learning_rate": 5e-3, "max_steps": 6, "moments": moments}
    return demo_spec(folder, **RANK, optim=optim, eval_every=3)


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_events(run_dir) if event["type"] == "step"]


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eight_bit")
    assert train(spec(folder, "8bit"), folder / "run") is Exit.SUCCEEDED
    return folder / "run"


def test_8_bit_moments_learn_as_float32_ones_do(eight_bit: Path, tmp_path: Path) -> None:
    train(spec(tmp_path, "float32"), tmp_path / "run")
    theirs, ours = losses(tmp_path / "run"), losses(eight_bit)
    assert ours[0] == theirs[0]
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.03)


def test_a_checkpoint_holds_a_byte_for_each_moment_and_no_tables(eight_bit: Path) -> None:
    state = load_file(eight_bit / "checkpoints" / "step-000006" / "optimizer.safetensors")
    kinds = {name.rpartition("|")[2] for name in state}
    assert kinds == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert any(tensor.dtype is torch.uint8 for tensor in state.values())


def test_a_paused_run_resumes_to_the_same_bits(
    eight_bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    from trainer.run_folder.checkpoint import Checkpoints

    save = Checkpoints.save

    def save_and_pause(self: Checkpoints, *parts: Any) -> Path:
        folder.request(PAUSE)
        return save(self, *parts)

    monkeypatch.setattr(Checkpoints, "save", save_and_pause)
    assert train(spec(tmp_path, "8bit"), folder.path) is Exit.PAUSED
    monkeypatch.undo()
    assert train(spec(tmp_path, "8bit"), folder.path, resume=True) is Exit.SUCCEEDED
    whole, cut = trained_weights(eight_bit, 6), trained_weights(folder.path, 6)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert json.loads((folder.path / "result.json").read_text())["step"] == 6


def test_what_cannot_have_8_bit_moments_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r'optim.moments: must be float32 with sharding "fsdp"'):
        demo_spec(tmp_path, sharding="fsdp", optim={"moments": "8bit"})
    weights = [torch.nn.Parameter(torch.zeros(4))]
    elsewhere = [torch.nn.Parameter(torch.zeros(4, device="meta"))]
    with pytest.raises(SpecError, match="no 8-bit step on meta"):
        make_optimizer(elsewhere, OptimSpec(moments="8bit"))
    monkeypatch.setattr("trainer.optim.find_spec", lambda _: None)
    with pytest.raises(SpecError, match="bitsandbytes"):
        make_optimizer(weights, OptimSpec(moments="8bit"))

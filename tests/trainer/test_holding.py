"""What a resident process holds for runs: a base as its files say, in one precision, for runs that can share it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from server.demo.assets import demo_base_path
from support.trainers.training import tiny_spec
from trainer.holding import held_for, is_held
from trainer.model.held import CPU, HeldBase, causal_of, tokenizer_of


def test_a_held_base_stands_for_its_files_in_its_precision_alone(tmp_path: Path) -> None:
    base = Path(shutil.copytree(demo_base_path(), tmp_path / "base"))
    held = HeldBase.read(base, torch.float32)
    spec = tiny_spec(base)
    assert is_held(spec, held)
    assert tokenizer_of(base, held) is held.tokenizer
    assert causal_of(base, torch.float32, CPU, held) is held.causal
    assert causal_of(base, torch.bfloat16, CPU, held).dtype is torch.bfloat16
    for other in (
        tiny_spec(base, precision="bfloat16"),
        tiny_spec(base, method="full"),
        tiny_spec(base, method="qlora"),
        tiny_spec(demo_base_path()),
    ):
        assert not is_held(other, held)
    config = base / "config.json"
    config.write_text(config.read_text() + "\n")
    assert not is_held(spec, held), "its files have changed"
    assert tokenizer_of(base, held) is not held.tokenizer
    assert causal_of(base, torch.float32, CPU, held) is not held.causal


def test_a_run_with_weights_of_its_own_has_nothing_held_for_it(tmp_path: Path) -> None:
    for spec in (tiny_spec(demo_base_path(), method="full"), tiny_spec(tmp_path / "no-folder")):
        assert held_for(spec) is None
        assert is_held(spec, None)
    assert not is_held(tiny_spec(demo_base_path()), None)

"""What a run leaves is served as it was trained: by PEFT, by our store and engine; a new base is a base of its own."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.store import AdapterStore
from server.demo.assets import demo_base_path
from server.engine.model.base_model import load_base
from server.jobs.gate.process import Precision, gate_run
from support.models.packed_forward import PackedForward
from support.trainers.training import STEPS, demo_spec
from trainer.model.model import load
from trainer.run import train
from trainer.run_folder.checkpoint import load_weights
from trainer.run_folder.folder import Exit

TOKENS = [5, 300, 17, 42, 9, 1200, 33]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4}},
    "patterns": {
        "adapter": {
            "rank": 4,
            "rslora": True,
            "target_modules": ["q_proj", "mlp.up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        }
    },
    "dora": {"method": "dora", "adapter": {"rank": 4}},
    "eva": {"adapter": {"rank": 4, "init": "eva"}},
    "orthogonal": {"adapter": {"rank": 4, "init": "orthogonal"}},
}


def publish(store: AdapterStore, folder: Path, base: Path) -> str:
    version = store.publish(
        tenant="acme",
        name="law",
        config=(folder / "adapter_config.json").read_bytes(),
        weights=folder / "adapter_model.safetensors",
        base=describe_base(base, dtype="float32"),
    )
    return str(version.digest)


def trained_logits(spec_folder: Path, run_dir: Path, **changes: Any) -> torch.Tensor:
    """Of the model as the trainer itself holds it after its best step, [T, V]."""
    spec = demo_spec(spec_folder, **changes)
    trainee = load(spec, torch.device("cpu"))
    best = json.loads((run_dir / "result.json").read_text())["best_step"]
    load_weights(trainee, run_dir / "checkpoints" / f"step-{best:06d}" / "weights.safetensors")
    ids = torch.tensor([TOKENS])
    with trainee.evaluating():
        return trainee.logits(ids, torch.arange(len(TOKENS))[None])


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """run_of(variant): the folder of a run that has ended."""

    def trained(variant: str) -> Path:
        folder = tmp_path_factory.mktemp(variant)
        assert train(demo_spec(folder, **VARIANTS[variant]), folder / "run") is Exit.SUCCEEDED
        return folder / "run"

    return cache(trained)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "eva"])
def test_a_trained_adapter_gives_peft_and_our_engine_the_trainers_logits(
    run_of: Callable[[str], Path], variant: str
) -> None:
    run_dir = run_of(variant)
    expected = trained_logits(run_dir.parent, run_dir, **VARIANTS[variant])
    plain = AutoModelForCausalLM.from_pretrained(demo_base_path(), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")  # of a config that is not PEFT's own
        peft = PeftModel.from_pretrained(plain, run_dir / "adapter").eval()
    with torch.no_grad():
        theirs = peft(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    engine = PackedForward(load_base(demo_base_path(), dtype="float32", device="cpu"), [run_dir / "adapter"])
    ours = engine.logits([engine.request(0, TOKENS, 0)])[0]
    torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-4)
    without = engine.logits([engine.request(1, TOKENS, None)])[0]
    assert (without - expected).abs().max() > 0.05, "the adapter does nothing"


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_store_takes_what_was_trained(run_of: Callable[[str], Path], tmp_path: Path, variant: str) -> None:
    store = AdapterStore.open(tmp_path / "data")
    store.tenants.create("acme")
    assert publish(store, run_of(variant) / "adapter", demo_base_path()).startswith("sha256:")
    store.close()


def test_the_gate_judges_dora_as_it_is_served_and_at_its_own_scale_alone(run_of: Callable[[str], Path]) -> None:
    result = gate_run(run_of("dora"), Precision(dtype="float32"))
    assert result.round_trip is not None, result.reasons
    assert result.round_trip.difference <= 1e-4
    assert result.held_out is not None
    assert list(result.held_out.sweep) == [1.0]


def test_a_full_fine_tune_is_a_new_base_on_which_adapters_of_the_old_one_are_refused(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    optim = {"learning_rate": 1e-4, "max_steps": STEPS}
    base = shutil.copytree(demo_base_path(), tmp_path / "base")
    (base / "tokenizer_drafts").mkdir()  # no file of the tokenizer's
    assert train(demo_spec(tmp_path, base=base, method="full", optim=optim), tmp_path / "full") is Exit.SUCCEEDED
    model = tmp_path / "full" / "model"
    assert describe_base(model).digest != describe_base(demo_base_path()).digest
    served = PackedForward(load_base(model, dtype="float32", device="cpu"), [])
    logits = served.logits([served.request(0, TOKENS, None)])[0]
    expected = trained_logits(tmp_path, tmp_path / "full", method="full", optim=optim)
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.1)  # the base's own type is bfloat16
    train(demo_spec(tmp_path, base=model, optim={"max_steps": 2}, eval_every=2), tmp_path / "on-new")
    store = AdapterStore.open(tmp_path / "data")
    store.tenants.create("acme")
    with pytest.raises(AdapterRejected) as caught:
        publish(store, run_of("lora") / "adapter", model)
    assert caught.value.code == "wrong_base"
    assert publish(store, tmp_path / "on-new" / "adapter", model)
    store.close()

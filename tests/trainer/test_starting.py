"""A run that goes on from an adapter begins with exactly that adapter, or says what does not fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.models.models import save_base
from support.trainers.training import demo_spec, random_examples, tiny_spec
from trainer.data.packing import pack
from trainer.model.adapter import adapter_tensors, digest_of, write_adapter
from trainer.model.model import load
from trainer.run import train
from trainer.run_folder.folder import Exit, RunFolder
from trainer.spec import AdapterSpec, SpecError, TrainSpec
from trainer.starting import filled_in

CPU = torch.device("cpu")
BASE_DIGEST = "sha256:" + "a" * 64
FORM: dict[str, Any] = {"rank": 3, "alpha": 5, "target_modules": ["down_proj", "q_proj"], "rank_pattern": {"q_proj": 2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "base", "llama")


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as the trainer writes it, no tensor of it zero."""
    folder = tmp_path_factory.mktemp("adapters") / "one"
    folder.mkdir()
    spec = tiny_spec(base, adapter=FORM, tool_dialect="hermes", adapter_dtype="int8")
    trainee = load(spec, CPU)
    torch.manual_seed(3)
    for weight in trainee.trained():
        torch.nn.init.normal_(weight, std=0.1)
    assert trainee.peft is not None
    write_adapter(trainee.peft, adapter_tensors(trainee.peft), folder, spec=spec, base_digest=BASE_DIGEST)
    return folder


def going_on(base: Path, folder: Path, **changes: Any) -> TrainSpec:
    return filled_in(tiny_spec(base, adapter={}, initial_adapter=str(folder), **changes))


def test_the_form_and_every_tensor_are_those_of_the_adapter(base: Path, written: Path) -> None:
    spec = going_on(base, written)
    assert spec.adapter == AdapterSpec.model_validate(FORM)
    assert (spec.tool_dialect, spec.adapter_dtype) == ("hermes", "int8")
    peft = load(spec, CPU).peft
    assert peft is not None
    given, mine = load_file(written / "adapter_model.safetensors"), adapter_tensors(peft)
    assert given.keys() == mine.keys()
    assert all(torch.equal(given[name], mine[name]) for name in given)


def test_preferences_are_learned_against_the_adapter_that_the_run_goes_on_from(base: Path, written: Path) -> None:
    trainee = load(going_on(base, written, method="dpo"), CPU)
    chosen, rejected = random_examples(2, seed=1)
    pair = type(chosen)(
        torch.cat([torch.tensor(chosen.input_ids), torch.tensor(rejected.input_ids)]).numpy(),
        torch.cat([torch.tensor(chosen.weights), -torch.tensor(rejected.weights)]).numpy(),
    )
    before = [weight.detach().clone() for weight in trainee.trained()]
    loss = trainee.loss(pack([pair]))
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(before, trainee.trained(), strict=True))
    with torch.no_grad():
        for weight in trainee.trained():
            weight.mul_(2)
    assert abs(float(trainee.loss(pack([pair]))) - math.log(2)) > 1e-4


def without_one(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, path)


def wider(folder: Path) -> None:
    configured(r=4)(folder)


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_one, "fit the base's layers"),
        (not_finite, "tensors are finite"),
        (wider, "fit the base's layers"),
        (configured(use_dora=True), "without use_dora"),
        (configured(alora_invocation_tokens=[5]), "without alora_invocation_tokens"),
        (configured(modules_to_save=["lm_head"]), "without modules_to_save"),
        (configured(peft_type="LOHA"), "plain LoRA adapter"),
        (configured(target_modules=[1, "q_proj"]), "plain module names"),
        (configured(multilora_tool_dialect="klingon"), "tool_dialect: must be one of"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "plain LoRA adapter"),
        (shutil.rmtree, "a folder with"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_any_step(
    base: Path, written: Path, tmp_path: Path, change: Callable[[Path], None], expected: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    change(folder)
    with pytest.raises(SpecError, match=expected) as refused:
        load(going_on(base, folder), CPU)
    assert refused.value.param in ("initial_adapter", "adapter.target_modules", "tool_dialect")


def test_another_base_and_another_form_are_refused(base: Path, written: Path) -> None:
    assert digest_of(written, BASE_DIGEST).startswith("sha256:")
    with pytest.raises(SpecError, match="an adapter of the base sha256:b"):
        digest_of(written, "sha256:" + "b" * 64)
    with pytest.raises(SpecError, match="adapter: must be absent, or as initial_adapter has it"):
        filled_in(tiny_spec(base, initial_adapter=str(written), adapter={"rank": 8}))
    assert going_on(base, written).adapter == filled_in(going_on(base, written)).adapter


def test_a_second_run_begins_where_the_first_one_ended(tmp_path: Path) -> None:
    first = demo_spec(tmp_path, optim={"learning_rate": 5e-3, "max_steps": 3}, eval_every=3)
    assert train(first, tmp_path / "one") is Exit.SUCCEEDED
    body = first.to_mapping() | {"adapter": {}, "initial_adapter": str(tmp_path / "one" / "adapter")}
    body |= {"optim": {"learning_rate": 1e-3, "max_steps": 1}}
    assert train(TrainSpec.from_mapping(body), tmp_path / "two") is Exit.SUCCEEDED
    one, two = (RunFolder(tmp_path / name).result() for name in ("one", "two"))
    assert two["losses"]["base"] == pytest.approx(one["losses"]["best"], rel=1e-5)
    assert two["losses"]["base"] < one["losses"]["base"]
    assert two["provenance"]["initial_adapter"].startswith("sha256:")

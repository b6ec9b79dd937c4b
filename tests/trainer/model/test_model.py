from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models.models import FAMILY_NAMES, MORE_FAMILY_NAMES, save_base
from support.models.stored_nf4 import save_in_nf4
from support.trainers.training import gradients, random_batch, random_examples, tiny_spec
from trainer.data.packing import InOrder
from trainer.data.types import IGNORED
from trainer.model.model import load
from trainer.model.packing_check import check_packing
from trainer.model.ranks import Ranks
from trainer.model.sharding import load_sharded
from trainer.spec import SpecError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MORE_FAMILY_NAMES])
def test_packed_loss_and_gradient_are_those_of_transformers_one_example_at_a_time(tmp_path: Path, family: str) -> None:
    """Windows, soft caps and tied heads included; the reference is transformers' own loss on eager attention."""
    base = save_base(tmp_path / "base", family)
    examples = random_examples(5, high=60)
    ours = load(tiny_spec(base, method="full"), CPU)
    (batch,) = InOrder(examples, micro_batch_tokens=1000)
    loss = ours.loss(batch)
    loss.backward()
    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        labels = ids.masked_fill(torch.from_numpy(example.weights)[None] == 0, IGNORED)
        total = total + theirs(input_ids=ids, labels=labels).loss * int(example.supervised.sum())
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    mine, reference = gradients(ours.trained()), gradients(list(theirs.parameters()))
    assert (mine - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MORE_FAMILY_NAMES])
def test_every_family_begins_a_run(tmp_path: Path, family: str) -> None:
    """The check at a run's start finds the decoder layers, wherever the family has them."""
    trainee = load(tiny_spec(save_base(tmp_path / "base", family)), CPU)
    assert 0 <= check_packing(trainee, random_examples(3, high=60)) < 1e-3


def test_gpt2s_layers_can_be_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    adapter = {"rank": 4, "target_modules": ["c_attn"], "rank_pattern": {"attn.c_attn": 2}}
    names = [name for name, _ in load(tiny_spec(base, adapter=adapter), CPU).named_trained()]
    assert len(names) == 4
    assert all("c_attn" in name for name in names)


def test_the_bases_own_dropout_is_off(tmp_path: Path) -> None:
    base, batch = save_base(tmp_path / "base", "llama", attention_dropout=0.5), random_batch(4)
    trainee = load(tiny_spec(base), CPU)
    assert trainee.module.training
    assert torch.equal(trainee.loss(batch), trainee.loss(batch))


def test_a_frozen_head_and_a_trained_one_give_the_adapter_the_same_gradient(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    batch = random_batch(4)
    targets = ["q_proj", "down_proj"]
    adapted = load(tiny_spec(base, adapter={"target_modules": targets, "init": "orthogonal"}), CPU)
    with_head = load(tiny_spec(base, adapter={"target_modules": [*targets, "lm_head"], "init": "orthogonal"}), CPU)
    for trainee in (adapted, with_head):
        trainee.loss(batch).backward()
    mine = {name: weight.grad for name, weight in adapted.named_trained()}
    theirs = {name: weight.grad for name, weight in with_head.named_trained()}
    assert any("lm_head" in name for name in theirs)
    assert all(theirs[name] is not None and theirs[name].any() for name in theirs)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    found = []
    for checkpointing in (False, True):
        trainee = load(tiny_spec(base, checkpointing=checkpointing, adapter={"init": "orthogonal"}), CPU)
        trainee.loss(random_batch(4)).backward()
        found.append(gradients(trainee.trained()))
    assert torch.equal(*found)


def test_filler_teaches_nothing_and_reaches_every_weight(tmp_path: Path) -> None:
    from trainer.data.packing import filler

    trainee = load(tiny_spec(save_base(tmp_path / "base", "llama")), CPU)
    loss = trainee.loss(filler())
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in trainee.trained())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_an_adapter_starts_as_the_base_itself(tmp_path: Path, method: str, precision: str) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    batch = random_batch(3)
    with torch.no_grad():
        plain = load(tiny_spec(base, method=method, precision=precision), CPU)
        start = plain.loss(batch)
        assert plain.peft is not None
        with plain.peft.disable_adapter():
            without = plain.loss(batch)
    assert torch.allclose(start, without, rtol=1e-6 if precision == "float32" else 5e-3)
    assert all(weight.dtype is torch.float32 for weight in plain.trained())


def test_the_seed_alone_decides_the_start(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(99 + len(states))
        states.append(torch.cat([weight.flatten() for weight in load(tiny_spec(base, seed=seed), CPU).trained()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_orthogonal_start_leaves_the_base_as_it_is_and_both_factors_alive(tmp_path: Path, method: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    trainee = load(tiny_spec(base, method=method, adapter={"rank": 4, "init": "orthogonal"}), CPU)
    assert all(weight.abs().max() > 0 for weight in trainee.trained())
    assert trainee.peft is not None
    layer = trainee.peft.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert product.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "dora"}, "method"),
        ({"adapter": {"rank": 4, "dropout": 0.1}}, "adapter.dropout"),
        ({"adapter": {"rank": 4, "alora_invocation_tokens": [5]}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"rank": 4, "init": "eva"}}, "adapter.init"),
    ],
)
def test_what_experts_cannot_have_is_refused_by_its_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    with pytest.raises(SpecError, match="where experts are trained") as refused:
        load(tiny_spec(base, **changes), CPU)
    assert refused.value.param == field
    adapter = {**changes.get("adapter", {}), "target_modules": ["q_proj"]}
    assert load(tiny_spec(base, **{**changes, "adapter": adapter}), CPU).trained()


def test_experts_do_not_start_orthogonal(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    with pytest.raises(
        SpecError, match=r"default where experts are trained.* model\.layers\.0\.mlp\.experts"
    ) as refused:
        load(tiny_spec(base, adapter={"rank": 4, "init": "orthogonal"}), CPU)
    assert refused.value.param == "adapter.init"
    spec = tiny_spec(base, adapter={"rank": 4, "init": "orthogonal", "target_modules": ["q_proj", "o_proj"]})
    assert all(weight.abs().max() > 0 for weight in load(spec, CPU).trained())


def test_a_gradient_after_an_evaluation_is_the_gradient_before_it_on_nf4(tmp_path: Path) -> None:
    """bitsandbytes repacks NF4 weights at an eval forward on AVX512-BF16 CPUs; later gradients are wrong."""
    base = save_base(tmp_path / "base", "llama", hidden_size=128, intermediate_size=128)
    trainee = load(tiny_spec(base, method="qlora", precision="bfloat16", adapter={"init": "orthogonal"}), CPU)
    found = []
    for _ in range(2):
        for weight in trainee.trained():
            weight.grad = None
        trainee.loss(random_batch(4)).backward()
        found.append(gradients(trainee.trained()))
        trainee.module.eval()
        with torch.no_grad():
            trainee.loss(random_batch(4))
        trainee.module.train()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("adapter", "param"),
    [
        ({"target_modules": ["q_proj", "qq_proj"]}, "adapter.target_modules"),
        ({"rank_pattern": {"qq_proj": 2}}, "adapter.rank_pattern"),
        ({"alpha_pattern": {"layers.9.mlp": 2}}, "adapter.alpha_pattern"),
    ],
)
def test_a_name_that_fits_no_layer_is_refused(tmp_path: Path, adapter: dict[str, object], param: str) -> None:
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(SpecError, match="linear layers of the base: down_proj") as caught:
        load(tiny_spec(base, adapter=adapter), CPU)
    assert caught.value.param == param


def test_a_base_that_is_stored_in_nf4_trains_as_one_that_is_quantised_here(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    stored = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float16)
    batch, found = random_batch(4), []
    for folder in (base, stored):
        torch.manual_seed(0)
        trainee = load(tiny_spec(folder, method="qlora", precision="float32", adapter={"init": "orthogonal"}), CPU)
        loss = trainee.loss(batch)
        loss.backward()
        found.append((loss.detach(), gradients(trainee.trained())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_base_that_is_stored_in_nf4_trains_in_the_precision_asked_for(tmp_path: Path, precision: str) -> None:
    """transformers keeps what is not quantised, and the type to multiply in, as stored: float16 here."""
    base = save_base(tmp_path / "base", "llama")
    stored = save_in_nf4(base, tmp_path / "stored", dtype=torch.float16, compute_dtype=torch.float16)
    trainee = load(tiny_spec(stored, method="qlora", precision=precision), CPU)
    assert check_packing(trainee, random_examples(3, high=60)) > 0


def test_what_needs_the_weights_themselves_refuses_a_base_that_is_stored_in_nf4(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    stored = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    for method in ("lora", "dora", "full"):
        with pytest.raises(SpecError, match="method: must be qlora for a base that is stored in NF4"):
            load(tiny_spec(stored, method=method), CPU)
    with pytest.raises(SpecError, match="sharding: must be none"):
        load_sharded(tiny_spec(stored, method="qlora", sharding="fsdp"), Ranks(0, 1, CPU))

"""What the gate measures is what the server computes: PEFT's own losses, at any scale, however a sequence is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterRejected
from adapters_store.format.adapter_folder import plan_folder
from server.engine.model.base_model import load_base
from server.engine.schedule import Schedule
from server.jobs.gate.adapter_weights import module_weights, weight_norms
from server.jobs.gate.peft_reference import round_trip
from server.jobs.gate.serving_scorer import ScorerSettings, ServingScorer, pack_folder
from support.models.expert_files import OF_EXPERTS, save_old_experts
from support.models.models import SWITCH, VOCAB, adapter_configs, peft_model, save_adapter, save_base
from support.models.stored_nf4 import save_in_nf4
from support.trainers.training_data import example
from trainer.data.types import EncodedExample
from trainer.gate.round_trip import judge_round_trip
from trainer.gate.spectrum import judge_spectrum, spectrum_of
from trainer.gate.thresholds import GateThresholds

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base, and an adapter with patterns."""
    folder = tmp_path_factory.mktemp("scorer")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(base, folder / "adapter", adapter_configs(NAMES)["patterns"], seed=1)


def scorer_of(folders: tuple[Path, Path], *, dtype: str = "float32", **settings: int) -> ServingScorer:
    base = load_base(folders[0], dtype=dtype)
    return ServingScorer(base, pack_folder(folders[1], base), ScorerSettings(**settings))  # type: ignore[arg-type]


def examples() -> list[EncodedExample]:
    made = [example(length, seed=length, context=1 + length // 3, vocab=VOCAB) for length in (2, 9, 30, 17, 64, 5)]
    made[2].weights[20:25] = 0.25
    made[4].weights[40:50] = 0.0
    return made


def pefts_losses(model: torch.nn.Module, items: list[EncodedExample]) -> list[float]:
    found = []
    for item in items:
        ids = torch.from_numpy(item.input_ids).long()
        with torch.inference_mode():
            logits = model(ids[None]).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        found.append(float((nll * torch.from_numpy(item.weights[1:])).sum()))
    return found


def test_losses_are_pefts_with_and_without_the_adapter(folders: tuple[Path, Path]) -> None:
    scorer = scorer_of(folders)
    for scale, adapter in ((1.0, folders[1]), (0.0, None)):
        found = scorer.losses(examples(), scale=scale)
        assert found.nll == pytest.approx(pefts_losses(peft_model(folders[0], adapter), examples()), rel=1e-4)
        assert found.weight.tolist() == [item.weight for item in examples()]


def test_a_scale_multiplies_the_adapters_effect(folders: tuple[Path, Path]) -> None:
    model = peft_model(folders[0], folders[1])
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            module.scaling = {name: value * 0.7 for name, value in scaling.items()}
    found = scorer_of(folders).losses(examples(), scale=0.7)
    assert found.nll == pytest.approx(pefts_losses(model, examples()), rel=1e-4)
    assert not np.allclose(found.nll, scorer_of(folders).losses(examples()).nll)


def test_losses_do_not_depend_on_how_sequences_share_forwards(folders: tuple[Path, Path]) -> None:
    expected = scorer_of(folders).losses(examples()).nll
    for forward_tokens, max_tokens in ((7, 64), (16, 100), (1, 80)):
        scorer = scorer_of(folders, forward_tokens=forward_tokens, max_tokens=max_tokens)
        assert scorer.losses(examples()).nll == pytest.approx(expected.tolist(), rel=1e-5)


def test_what_cannot_be_scored_is_refused(folders: tuple[Path, Path]) -> None:
    scorer = scorer_of(folders, max_tokens=20)
    with pytest.raises(ValueError, match="a sequence has 30 tokens, the scorer takes 20"):
        scorer.losses(examples())
    with pytest.raises(ValueError, match="scale must be one of"):
        scorer.losses(examples()[:2], scale=0.5)


def test_generation_is_greedy_and_ends_at_the_end_token(folders: tuple[Path, Path]) -> None:
    scorer = scorer_of(folders, forward_tokens=16)
    prompts = [item.input_ids.tolist() for item in examples()[:4]]
    for scale, adapter in ((1.0, folders[1]), (0.0, None)):
        model = peft_model(folders[0], adapter)
        found = scorer.generate(prompts, scale=scale, max_new_tokens=6)
        for prompt, got in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt])
            for token in got:
                assert int(model(ids).logits[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            assert len(got) == 6
        first = found[0][2]
        ended = scorer.generate(prompts[:1], scale=scale, max_new_tokens=6, eos_ids=frozenset([first]))
        assert ended[0] == found[0][: found[0].index(first)]


def test_base_and_adapter_answer_in_the_same_forwards(folders: tuple[Path, Path]) -> None:
    scorer = scorer_of(folders)
    prompts = [item.input_ids.tolist() for item in examples()[:4]]
    apart = [scorer.generate(prompts, scale=scale, max_new_tokens=6) for scale in (0.0, 1.0)]
    run, num_rows = scorer._runner.run, list[int]()

    def counted(schedule: Schedule, **options: Any) -> Any:
        num_rows.append(len(schedule.rows))
        return run(schedule, **options)

    scorer._runner.run = counted  # type: ignore[method-assign]
    assert scorer.answers(prompts, (0.0, 1.0), max_new_tokens=6, eos_ids=frozenset()) == apart
    assert num_rows == [8] * 6
    assert scorer.answers([], (0.0, 1.0), max_new_tokens=6, eos_ids=frozenset()) == [[], []]


def test_losses_and_continuations_are_pefts_on_both_sides_of_longropes_switch(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "phi3-longrope")
    config = adapter_configs(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])["plain"]
    adapter = save_adapter(base, tmp_path / "adapter", config, seed=1)
    scorer, model = scorer_of((base, adapter), forward_tokens=16), peft_model(base, adapter)
    assert scorer.losses(examples()).nll == pytest.approx(pefts_losses(model, examples()), rel=1e-4)
    prompts = [
        item.input_ids[:length].tolist() for item, length in zip(examples()[2:5], (SWITCH - 3, 9, 40), strict=True)
    ]
    for prompt, got in zip(prompts, scorer.generate(prompts, max_new_tokens=8), strict=True):
        known = torch.tensor([prompt])
        for token in got:
            assert int(model(known, use_cache=False).logits[0, -1].argmax()) == token
            known = torch.cat([known, torch.tensor([[token]])], dim=1)
        assert len(got) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_round_trip_holds_for_the_same_adapter_and_not_for_another(
    folders: tuple[Path, Path], dtype: str, tmp_path: Path
) -> None:
    prompts = [item.input_ids.tolist() for item in examples()]
    scorer, limits = scorer_of(folders, dtype=dtype), GateThresholds()
    assert judge_round_trip(round_trip(scorer, *folders, prompts, limits)) == []
    other = save_adapter(folders[0], tmp_path / "other", adapter_configs(NAMES)["patterns"], seed=2)
    (reason,) = judge_round_trip(round_trip(scorer, folders[0], other, prompts, limits))
    assert reason.level == "block"


def test_the_weights_are_the_updates_peft_merges(folders: tuple[Path, Path]) -> None:
    base = load_base(folders[0], dtype="float32")
    modules = {
        item.name: item for item in module_weights(plan_folder(folders[1], base.description), folders[1], folders[0])
    }
    model = peft_model(folders[0], folders[1])
    assert len(modules) == len(base.description.modules) - 1
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            found = modules[path.removeprefix("base_model.model.")]
            update = layer.get_delta_weight("default")
            assert torch.allclose(found.scale * found.b @ found.a, update, atol=1e-6)
            assert found.base_norm == pytest.approx(float(layer.base_layer.weight.norm()), rel=1e-5)
            assert spectrum_of(found).norm == pytest.approx(float(update.norm()), rel=1e-4)


@pytest.mark.parametrize("kind", ["parameters", "old"])
def test_each_experts_update_is_measured_beside_its_own_weight(tmp_path: Path, kind: str) -> None:
    """The base's files hold layers of each expert; then one parameter for all, as transformers has them in memory."""
    base = save_base(tmp_path / "base", "qwen3-moe")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets)
    old = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", *OF_EXPERTS]}
    adapter = tmp_path / "adapter"
    if kind == "old":
        save_old_experts(base, adapter, seed=1, **old)
    else:
        save_adapter(base, adapter, config, seed=1)
    plan = plan_folder(adapter, load_base(base).description)
    modules = {item.name: item for item in module_weights(plan, adapter, base)}
    model = peft_model(base, adapter)
    wrapped = {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.parameter_name}": layer
        for path, layer in model.named_modules()
        if hasattr(layer, "parameter_name")
    }
    assert wrapped.keys() == {stack.name for stack in plan.experts}
    assert len(modules) == 2 + 8 * len(wrapped)
    for stack, layer in wrapped.items():
        container, _, name = stack.rpartition(".")
        each = zip(layer.get_delta_weight("default"), layer.get_param(), strict=True)
        for expert, (update, weight) in enumerate(each):
            found = modules[f"{container}.{expert}.{name}"]
            assert torch.allclose(found.scale * found.b @ found.a, update, atol=1e-6)
            assert found.base_norm == pytest.approx(float(weight.norm()), rel=1e-5)
    whole = {name: weight.detach().clone() for name, weight in peft_model(base, None).named_parameters()}
    (base / "model.safetensors").unlink()
    save_file(whole, base / "model.safetensors")
    again = {item.name: item.base_norm for item in module_weights(plan, adapter, base)}
    assert again == pytest.approx({name: item.base_norm for name, item in modules.items()})


def test_an_update_of_experts_alone_that_is_nothing_or_explodes_is_blocked(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    adapter = save_adapter(base, tmp_path / "adapter", config, seed=1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for factor in (0.0, 0.01, 1e4):
        grown = {name: values * (factor if "lora_B" in name else 1.0) for name, values in tensors.items()}
        save_file(grown, adapter / "adapter_model.safetensors")
        weights = module_weights(plan_folder(adapter, load_base(base).description), adapter, base)
        reasons = judge_spectrum([spectrum_of(item) for item in weights], GateThresholds())
        found[factor] = [reason.code for reason in reasons]
    assert found == {0.0: ["no_effect"], 0.01: [], 1e4: ["exploding_norm"]}


def test_the_norms_of_a_base_that_is_stored_in_nf4_are_those_of_what_it_stands_for(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also where a weight and what is about it lie in different files."""
    stored = save_in_nf4(folders[0], tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    whole = load_file(stored / "model.safetensors")
    (stored / "model.safetensors").unlink()
    for part in (0, 1):
        save_file({name: whole[name] for name in sorted(whole)[part::2]}, stored / f"model-{part}.safetensors")
    names = [item.name for item in plan_folder(folders[1], load_base(folders[0]).description).modules]
    found, exact = weight_norms(stored, names), weight_norms(folders[0], names)
    assert found.keys() == exact.keys()
    assert found == pytest.approx(exact, rel=0.1)  # what NF4 loses
    assert found != exact


def test_an_adapter_the_server_would_not_take_is_not_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = adapter_configs(NAMES)["plain"]
    config.target_modules, config.use_dora = {"q_proj", "embed_tokens"}, True
    dora = save_adapter(folders[0], tmp_path / "dora", config, seed=3)
    with pytest.raises(AdapterRejected) as refused:
        pack_folder(dora, load_base(folders[0], dtype="float32"))
    assert refused.value.code == "unsupported_dora"

"""Adapters on the experts of Qwen3-MoE: in a mixed batch each row has the logits that PEFT gives it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.base.description import BaseDescription, expert_name
from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected, AdapterUnavailable
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.limits import AdapterLimits
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.mix import Part, mix_of
from adapters_store.packed.mixing import mixed
from adapters_store.packed.packing import pack, packed_bytes
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.store import AdapterStore
from lora_kernels.background import TimeSlices
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, matrices_at
from lora_kernels.native.bindings import native_ops
from server.engine.model.base_model import load_base
from server.engine.model.lora_layers import AdapterExperts, AdapterRouter
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.request import Request, SamplingParams
from server.engine.schedule import ScheduledRow
from server.engine.startup.settings import MemoryBudget
from support.models.expert_files import ATTENTION, OF_EXPERTS, PREFIX, save_old_experts
from support.models.models import VOCAB, peft_model, save_adapter, save_base
from support.models.packed_forward import PackedForward, pack_folder
from support.models.random_peft import as_int8
from support.servers.service import greedy_by_peft, make_base, running, stats_of
from trainer.merge import merge

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALL = [*ATTENTION, *OF_EXPERTS]
STACKED: dict[str, LoraConfig] = {
    "both": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS),
    "down": LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        target_modules=[],
        target_parameters=["experts.down_proj"],
        rank_pattern={"layers.1.mlp.experts.down_proj": 5},
    ),
    "gate and up": LoraConfig(
        r=2, lora_alpha=3, target_modules=["v_proj"], target_parameters=EXPERTS[:1], alpha_pattern={"gate_up_proj": 7}
    ),
    "by layers' names": LoraConfig(r=2, lora_alpha=6, target_modules=ALL),  # PEFT writes a pattern for gate_up_proj
    "all-linear": LoraConfig(r=3, lora_alpha=4, target_modules="all-linear"),  # the routers too
    "routers": LoraConfig(r=5, target_modules=[], target_parameters=["gate.weight"], rank_pattern={"gate.weight": 2}),
}
OLD: dict[str, dict[str, Any]] = {
    "old": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", *OF_EXPERTS]},
    "old down": {"r": 2, "target_modules": ["down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 5}},
    "old routers": {"r": 4, "lora_alpha": 6, "target_modules": ["gate", "q_proj", *OF_EXPERTS]},
    "old pattern": {"r": 2, "target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"},
}
KINDS = (*STACKED, *OLD)
SLOTS = (0, None, 1, 0)
LENGTHS = (41, 5, 17, 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("experts") / "base", "qwen3-moe")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    made = {
        kind: save_adapter(base, base.parent / kind, config, seed=seed)
        for seed, (kind, config) in enumerate(STACKED.items())
    }
    for seed, (kind, fields) in enumerate(OLD.items()):
        made[kind] = save_old_experts(base, base.parent / kind, seed=seed, **fields)
    return made


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(
    base: Path, folders: list[Path], dtype: str, *, quantize: str | None = None, slots: Sequence[int | None] = SLOTS
) -> list[torch.Tensor]:
    """The prompts in two pieces, as chunked prefill cuts them."""
    forward = PackedForward(load_base(base, dtype=dtype, quantize=quantize), folders, num_sequences=len(slots))
    return logits_of(forward, slots)


def logits_of(forward: PackedForward, slots: Sequence[int | None] = SLOTS) -> list[torch.Tensor]:
    requests = [forward.request(index, ids, slots[index]) for index, ids in enumerate(prompts()[: len(slots)])]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


def pefts(base: Path, folders: list[Path], dtype: torch.dtype, nf4: Any = None) -> list[torch.Tensor]:
    models = {slot: peft_model(base, None if slot is None else folders[slot], dtype=dtype, nf4=nf4) for slot in SLOTS}
    return alone(models)


def alone(models: dict[int | None, torch.nn.Module]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [models[slot](torch.tensor([ids])).logits[0] for slot, ids in zip(SLOTS, prompts(), strict=True)]


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


def assert_close(got: list[torch.Tensor], exact: list[torch.Tensor], limit: float = 1e-4) -> None:
    for one, other in zip(got, exact, strict=True):
        assert (one - other).abs().max() <= limit * max(1.0, float(other.abs().max()))


PAIRS = [
    ("both", "old"),
    ("down", "by layers' names"),
    ("old down", "gate and up"),
    ("all-linear", "old pattern"),
    ("routers", "old routers"),
]


@pytest.mark.parametrize("kinds", PAIRS)
def test_float32_and_bfloat16_logits_are_pefts(base: Path, adapters: dict[str, Path], kinds: tuple[str, str]) -> None:
    folders = [adapters[kind] for kind in kinds]
    exact = pefts(base, folders, torch.float32)
    assert_close(ours(base, folders, "float32"), exact)
    bare = alone(dict.fromkeys(SLOTS, peft_model(base, None)))
    assert all((bare[index] - exact[index]).abs().max() > 1e-2 for index in (0, 2))  # each adapter does something
    assert error(ours(base, folders, "bfloat16"), exact) <= 1.5 * error(pefts(base, folders, torch.bfloat16), exact)


def test_nf4_logits_are_pefts_on_the_same_nf4_base(base: Path, adapters: dict[str, Path]) -> None:
    """The experts of an NF4 base are plain."""
    folders = [adapters["both"], adapters["old"]]
    loaded = load_base(base, dtype="float32", quantize="nf4")
    assert loaded.model.get_parameter("model.layers.0.mlp.experts.base.down_proj").dtype == torch.float32
    exact = pefts(base, folders, torch.float32, nf4=loaded.config.quantization_config)
    assert_close(ours(base, folders, "float32", quantize="nf4"), exact, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_pefts_delta_and_its_bytes_are_counted(
    base: Path, adapters: dict[str, Path], kind: str
) -> None:
    description = describe_base(base)
    packed = pack_folder(adapters[kind], load_base(base))
    model = peft_model(base, adapters[kind])
    deltas = {f"{name.removeprefix(PREFIX)}": delta for name, delta in deltas_of(model)}
    places = {module.name: module for module in packed.modules}
    assert {name.rpartition(".")[0] for name in places if ".experts." in name} == deltas.keys()
    for stack, delta in deltas.items():
        for expert, wanted in enumerate(delta):
            module, shape = places[expert_name(stack, expert)], description.experts[stack]
            place = (0, module.a_offset, module.b_offset, module.rank, 1.0)
            a, b = matrices_at(packed.buffer, place, shape.in_features, shape.out_features, is_int8=False)
            assert torch.allclose(b.T @ a * module.scale, wanted, rtol=1e-5, atol=1e-7)
    values = sum(tensor.numel() for tensor in load_file(adapters[kind] / WEIGHTS_FILE).values())
    assert packed.num_bytes == packed_bytes(plan_folder(adapters[kind], description)) >= 4 * values


def deltas_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Of PEFT's wrapped parameters: their path, [experts, out, in]."""
    return [
        (f"{name.replace('.base_layer', '')}.{module.parameter_name}", module.get_delta_weight("default").detach())
        for name, module in model.named_modules()
        if type(module).__name__ == "ParamWrapper" and "gate" not in name.rpartition(".")[2]
    ]


def test_rows_without_an_adapter_have_the_bits_that_they_have_alone_and_nearly_transformers(
    base: Path, adapters: dict[str, Path]
) -> None:
    for dtype in ("float32", "bfloat16"):
        loaded = load_base(base, dtype=dtype)
        forward = PackedForward(loaded, [adapters["all-linear"], adapters["old routers"]])
        path = "model.layers.1.mlp.experts"
        experts, router = (loaded.model.get_submodule(each) for each in (path, "model.layers.1.mlp.gate"))
        assert isinstance(experts, AdapterExperts)
        assert isinstance(router, AdapterRouter)
        x = torch.randn(60, 64, generator=torch.Generator().manual_seed(1)).to(loaded.dtype)
        chosen = torch.rand(60, 8, generator=torch.Generator().manual_seed(2)).topk(4)
        weights = chosen.values.to(loaded.dtype)
        slots = np.resize(np.array([0, NO_ADAPTER, 1, NO_ADAPTER, 1], dtype=np.int32), 60)
        with torch.inference_mode():
            theirs = AutoModelForCausalLM.from_pretrained(base, dtype=loaded.dtype).get_submodule(path)
            wanted = theirs(x, chosen.indices, weights)
            bare, bare_scores = experts(x, chosen.indices, weights), router(x)[0]
            torch.testing.assert_close(bare, wanted, rtol=1e-4 if dtype == "float32" else 0.02, atol=0.02)
            loaded.lora.layers = LoraBatch(forward.table, slots)
            got, scores = experts(x, chosen.indices, weights), router(x)[0]
            loaded.lora.layers = None
            few = [experts(x[:count], chosen.indices[:count], weights[:count]) for count in (1, 2, 9, 40)]
        for one, other in ((got, bare), (scores, bare_scores)):
            same = (one == other).all(dim=1).numpy()
            assert same[slots == NO_ADAPTER].all()
            assert not same.all()
        native = native_ops(loaded.dtype)
        if native is not None and native.linear_max_rows:  # else transformers' own products, which differ by their rows
            assert all(torch.equal(part, bare[: len(part)]) for part in few)


def test_where_transformers_has_no_grouped_product_experts_do_without_it(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU before compute capability 8.0, where torch's own refuses."""

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("grouped_mm is only supported on CUDA devices with compute capability >= 8.0")

    monkeypatch.setattr("server.engine.model.lora_layers.has_expert_kernel", lambda _: False)
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuses)
    folders = [adapters["both"], adapters["old"]]
    assert_close(ours(base, folders, "float32"), pefts(base, folders, torch.float32))


def test_a_sum_of_adapters_on_experts_is_the_sum_of_their_deltas(base: Path, adapters: dict[str, Path]) -> None:
    """PEFT's `add_weighted_adapter` takes none; its own deltas, added to the base's weights, are the oracle."""
    loaded, folders, weights = load_base(base, dtype="float32"), [adapters["both"], adapters["old"]], (0.7, -1.6)
    parts = [(pack_folder(folder, loaded), weight) for folder, weight in zip(folders, weights, strict=True)]
    digest = mix_of(Part(adapter.digest, weight) for adapter, weight in parts)
    total = mixed(digest, parts, loaded.description, HostBuffers(), TimeSlices())
    model, plain = peft_model(base, None), dict(peft_model(base, None).named_parameters())
    for folder, weight in zip(folders, weights, strict=True):
        apart = peft_model(base, folder)
        assert isinstance(apart, PeftModel)
        merged = dict(apart.merge_and_unload().named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(merged[name] - plain[name], alpha=weight)
    models = {0: peft_model(base, folders[0]), 1: model, None: peft_model(base, None)}
    assert_close(logits_of(PackedForward(loaded, [folders[0], total])), alone(models), 1e-3)


def test_in_int8_the_logits_are_pefts_with_the_rounded_matrices(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A rank's row of A and column of B have one scale each, in every expert."""
    folder, rounded = adapters["both"], tmp_path / "rounded"
    rounded.mkdir()
    (rounded / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    whole = {}
    for name, values in load_file(folder / WEIGHTS_FILE).items():
        scales = values.abs().amax(dim=1 if "lora_A" in name else 0, keepdim=True) / 127
        whole[name] = torch.round(values / scales) * scales
    save_file(whole, rounded / WEIGHTS_FILE)
    small = tmp_path / "int8"
    small.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (small / name).write_bytes((folder / name).read_bytes())
    loaded = load_base(base, dtype="float32")
    got = logits_of(PackedForward(loaded, [as_int8(small), adapters["down"]]))
    assert_close(got, pefts(base, [rounded, adapters["down"]], torch.float32))
    assert pack_folder(small, loaded).num_bytes < 0.5 * pack_folder(folder, loaded).num_bytes


def test_tokens_are_pefts_where_few_adapters_fit_and_are_packed_again(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3-moe")
    folders = {
        "both": save_adapter(base, tmp_path / "both", STACKED["both"], seed=0),
        "all-linear": save_adapter(base, tmp_path / "all", STACKED["all-linear"], seed=1),
        "old": save_old_experts(base, tmp_path / "old", seed=2, **OLD["old"]),
    }
    sizes = [packed_bytes(plan_folder(folder, describe_base(base, dtype="float32"))) for folder in folders.values()]
    memory = MemoryBudget(kv_cache=4 << 20, adapter_pool=max(sizes) + 4096, host_cache=max(sizes) + 4096)
    prompt = list(range(40, 61))
    with running(base, folders, tmp_path / "data", memory=memory) as service:
        with service.held():
            names = [*folders, None, *folders]
            answers = [service.ask(prompt, name, max_tokens=6)[1] for name in names]
        for name, answer in zip(names, answers, strict=True):
            assert answer.tokens() == greedy_by_peft(base, folders[name] if name else None, prompt, 6)
        assert stats_of(service.worker).counters["adapter_evictions"] >= 2


def test_the_limit_of_tensors_counts_those_of_single_experts(base: Path, adapters: dict[str, Path]) -> None:
    """4 for each of 2 x 8 experts of 2 layers: 128; the file has 100."""
    description = describe_base(base)
    assert plan_folder(adapters["old"], description, AdapterLimits(max_tensors=10)).experts
    with pytest.raises(AdapterRejected, match="more than 12"):
        plan_folder(adapters["old"], replace(description, experts={}), AdapterLimits(max_tensors=10))


def test_a_step_with_such_an_adapter_is_no_recorded_one(base: Path, adapters: dict[str, Path]) -> None:
    table = PackedForward(load_base(base), [adapters["both"], attention_alone(base)]).table
    buffers = DecodeBuffers(table, max_rows=4, max_context=16, block_size=4)
    step = [
        ScheduledRow(Request(id=str(slot), tenant="t", prompt_ids=[1], params=SamplingParams(), slot=slot), 0, 1)
        for slot in (None, 1, 0)
    ]
    assert not buffers.need_plain_launches(step[:2])
    assert buffers.need_plain_launches(step)
    table.clear_slot(0)
    assert not buffers.need_plain_launches(step)


def attention_alone(base: Path) -> Path:
    return save_adapter(base, base.parent / "attention", LoraConfig(r=2, target_modules=ATTENTION), seed=9)


def test_identity_follows_what_an_expert_computes(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    description = describe_base(base)
    assert BaseDescription.from_json(description.to_json()) == description
    assert replace(description, experts={}).layout_key != description.layout_key
    digests = {pack(plan_folder(folder, description), folder / WEIGHTS_FILE).digest for folder in adapters.values()}
    tensors = load_file(adapters["both"] / WEIGHTS_FILE)
    swapped = {name: tensors[name].flip(0) if ".experts.lora_A" in name else tensors[name] for name in tensors}
    (tmp_path / CONFIG_FILE).write_bytes((adapters["both"] / CONFIG_FILE).read_bytes())
    save_file(swapped, tmp_path / WEIGHTS_FILE)
    digests.add(pack(plan_folder(tmp_path, description), tmp_path / WEIGHTS_FILE).digest)
    assert len(digests) == len(KINDS) + 1
    plan = plan_folder(adapters["both"], description)
    assert (plan.max_rank, plan.target_modules) == (4, ("down_proj", "gate_up_proj", "o_proj", "q_proj"))


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
LAYER = f"{PREFIX}model.layers.0.mlp.experts"
REFUSED: dict[str, tuple[str, str, Change, str]] = {
    "another parameter": (
        "both",
        "unsupported_target_parameters",
        lambda body, tensors: body.update(target_parameters=[*EXPERTS, "norm.weight"]),
        "'norm.weight' is not served; served are the experts' down_proj, gate_up_proj and the router",
    ),
    "a router untargeted": (
        "routers",
        "untargeted_module",
        lambda body, tensors: body.update(target_parameters=EXPERTS),
        r"mlp\.gate: has tensors",
    ),
    "DoRA on a router": (
        "routers",
        "missing_magnitude",
        lambda body, tensors: body.update(use_dora=True),
        "lora_magnitude_vector is missing",
    ),
    "an old router's pattern": (
        "old routers",
        "rank_mismatch",
        lambda body, tensors: body.update(alpha_pattern={"gate": 12}),
        r"mlp\.gate: trained with rank 4 and scale 3, and PEFT 0\.21 gives its weight rank 4 and scale 1\.5",
    ),
    "rank": ("both", "wrong_shape", lambda body, tensors: body.update(r=5), r"its size is \[32, 64\], \[40, 64\] is"),
    "too large a rank": (
        "both",
        "rank_too_large",
        lambda body, tensors: body.update(r=300),
        "rank 300 exceeds max_rank 256",
    ),
    "one parameter untargeted": (
        "both",
        "wrong_shape",  # PEFT then takes the outer tensors for the other parameter
        lambda body, tensors: body.update(target_parameters=EXPERTS[:1]),
        "is needed",
    ),
    "none targeted": (
        "both",
        "untargeted_module",
        lambda body, tensors: body.update(target_parameters=None),
        "the config targets none of the experts' parameters",
    ),
    "half a pair": (
        "both",
        "missing_b",
        lambda body, tensors: tensors.pop(f"{LAYER}.lora_B.weight"),
        r"lora_B\.weight is missing",
    ),
    "twice": (
        "both",
        "duplicate_tensor",
        lambda body, tensors: tensors.update({f"{LAYER}.lora_A.default.weight": tensors[f"{LAYER}.lora_A.weight"]}),
        "is the same tensor",
    ),
    "no zero delta": (
        "both",
        "missing_tensors",
        lambda body, tensors: (
            body.update(init_lora_weights=False),
            [tensors.pop(f"{LAYER}.lora_{side}.weight") for side in "AB"],
        ),
        "targeted, without tensors",
    ),
    "DoRA": ("both", "unsupported_dora", lambda body, tensors: body.update(use_dora=True), "DoRA on experts"),
    "activated": (
        "both",
        "unsupported_target_parameters",
        lambda body, tensors: body.update(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "an activated LoRA on experts",
    ),
    "a name": (
        "both",
        "bad_field",
        lambda body, tensors: body.update(target_parameters="mlp.experts.down_proj"),
        "a list of parameter names",
    ),
    "no such expert": (
        "old",
        "unknown_module",
        lambda body, tensors: tensors.update(
            {f"{LAYER}.8.up_proj.lora_{side}.weight": tensors[f"{LAYER}.7.up_proj.lora_{side}.weight"] for side in "AB"}
        ),
        "8 experts with gate_proj, up_proj and down_proj",
    ),
    "one expert missing": (
        "old",
        "missing_tensors",
        lambda body, tensors: [tensors.pop(f"{LAYER}.3.up_proj.lora_{side}.weight") for side in "AB"],
        r"experts\.3\.up_proj: has no tensors, and another expert",
    ),
    "gate without down": (
        "old",
        "untargeted_module",
        lambda body, tensors: body.update(target_modules=["q_proj", "gate_proj", "up_proj"]),
        "names gate_proj, up_proj and down_proj",
    ),
    "rsLoRA": (
        "old",
        "rank_mismatch",
        lambda body, tensors: body.update(use_rslora=True),
        "rank 3 and scale 3.4641; PEFT 0.21 joins it to experts of rank 6 and scale 4.89898",
    ),
    "a pattern of gate_proj": (
        "old",
        "rank_mismatch",
        lambda body, tensors: body.update(alpha_pattern={"gate_proj": 12}),
        "scale 4; PEFT",
    ),
    "another rank": (
        "old",
        "wrong_shape",
        lambda body, tensors: body.update(r=4, lora_alpha=8),
        r"lora_A.weight: its size is \[3, 64\], \[4, 64\] is needed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_not_compute_is_refused_by_name(
    base: Path, adapters: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, code, change, message = REFUSED[case]
    body = json.loads((adapters[kind] / CONFIG_FILE).read_text())
    tensors = load_file(adapters[kind] / WEIGHTS_FILE)
    change(body, tensors)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(body))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRejected, match=message) as refused:
        plan_folder(tmp_path, describe_base(base))
    assert refused.value.code == code


def test_why_some_old_adapters_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """PEFT 0.21 scales rsLoRA by the root of the joined rank, and finds no place for gate and up without down."""
    plain = dict(deltas_of(peft_model(base, adapters["old"])))
    body = json.loads((adapters["old"] / CONFIG_FILE).read_text())
    (tmp_path / WEIGHTS_FILE).write_bytes((adapters["old"] / WEIGHTS_FILE).read_bytes())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(body | {"use_rslora": True}))
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    found = {name.removeprefix(PREFIX): delta for name, delta in deltas_of(peft_model(base, tmp_path))}[stack]
    trained = plain[PREFIX + stack] / body["lora_alpha"] * body["r"] * body["lora_alpha"] / body["r"] ** 0.5
    assert torch.allclose(found, trained * 2**0.5, rtol=1e-4, atol=1e-6)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(body | {"target_modules": ["q_proj", "gate_proj", "up_proj"]}))
    tensors = load_file(adapters["old"] / WEIGHTS_FILE)
    save_file({name: tensors[name] for name in tensors if "down_proj" not in name}, tmp_path / WEIGHTS_FILE)
    assert all(not delta.any() for _, delta in deltas_of(peft_model(base, tmp_path)))


def test_a_base_without_experts_takes_no_target_parameters(adapters: dict[str, Path], tmp_path: Path) -> None:
    description = describe_base(save_base(tmp_path / "base", "qwen3"))
    with pytest.raises(AdapterRejected, match="base has no experts") as refused:
        plan_folder(adapters["both"], description)
    assert refused.value.code == "unsupported_target_parameters"


SAVED_BEFORE: dict[str, dict[str, Any]] = {
    "a router's name": {"target_modules": [*ATTENTION, "gate"]},
    "all-linear, orthogonal": {
        "target_modules": "all-linear",
        "exclude_modules": ["lm_head"],
        "init_lora_weights": "orthogonal",
    },
    "seven names, random": {"target_modules": [*ATTENTION, *OF_EXPERTS], "init_lora_weights": False},
}


@pytest.mark.parametrize("case", SAVED_BEFORE)
def test_names_of_experts_mean_none_where_the_file_has_only_other_layers(base: Path, tmp_path: Path, case: str) -> None:
    """As such adapters were taken before experts were served; PEFT 0.21 would draw random deltas for them."""
    folder = save_adapter(base, tmp_path / "saved", LoraConfig(r=2, target_modules=ATTENTION), seed=9)
    plain = plan_folder(folder, describe_base(base))
    body = json.loads((folder / CONFIG_FILE).read_text()) | SAVED_BEFORE[case]
    (folder / CONFIG_FILE).write_text(json.dumps(body))
    assert plan_folder(folder, describe_base(base)) == plain
    (folder / CONFIG_FILE).write_text(json.dumps(body | {"init_lora_weights": False, "target_parameters": EXPERTS}))
    with pytest.raises(AdapterRejected, match="gate_up_proj: targeted, without tensors") as refused:
        plan_folder(folder, describe_base(base))
    assert refused.value.code == "missing_tensors"


def test_a_version_that_takes_no_experts_refuses_what_another_stored_and_quarantines_nothing(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    store, description = AdapterStore.open(tmp_path / "data"), describe_base(base)
    store.tenants.create("acme")
    folder, earlier = adapters["both"], replace(description, experts={})
    config, weights = (folder / CONFIG_FILE).read_bytes(), folder / WEIGHTS_FILE
    version = store.publish(tenant="acme", name="moe", config=config, weights=weights, base=description)
    for ask in (store.load_packed, store.verify):
        with pytest.raises(AdapterUnavailable, match="base has no experts") as refused:
            ask(version.digest, earlier)
        assert refused.value.code == "unsupported_target_parameters"
    assert store.quarantine.entries() == []
    assert store.load_packed(version.digest, description).digest == version.digest
    store.verify(version.digest, description)
    store.close()


@pytest.mark.parametrize("form", ["layers of each expert", "parameters"])
@pytest.mark.parametrize("kind", ["both", "down", "all-linear", "old"])
def test_a_merged_base_has_pefts_merged_weights(
    base: Path, adapters: dict[str, Path], tmp_path: Path, kind: str, form: str
) -> None:
    """As hubs store experts, and as models have them."""
    stored = tmp_path / "base"
    shutil.copytree(base, stored)
    if form == "parameters":
        model = AutoModelForCausalLM.from_pretrained(base)
        save_file(dict(model.named_parameters()), stored / "model.safetensors", metadata={"format": "pt"})
    assert any(".experts.0." in name for name in load_file(stored / "model.safetensors")) == (form != "parameters")
    merged = merge(stored, adapters[kind], tmp_path / "merged", description=describe_base(stored))
    assert merged.parity.holds
    assert merged.parity.effect > 0.01
    apart = peft_model(stored, adapters[kind])
    assert isinstance(apart, PeftModel)
    wanted = dict(apart.merge_and_unload().named_parameters())
    for name, got in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters():
        torch.testing.assert_close(got, wanted[name], rtol=1e-5, atol=1e-6)
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"config.json", "multilora_merge.json"}


def test_a_mixed_batch_keeps_the_bits_of_bare_rows(base: Path, adapters: dict[str, Path]) -> None:
    folders = [adapters["both"], adapters["old"]]
    for dtype in ("float32", "bfloat16"):
        bare, beside = ours(base, folders, dtype, slots=(None,) * 4), ours(base, folders, dtype)
        assert torch.equal(beside[1], bare[1]), dtype
        assert not torch.equal(beside[0], bare[0])

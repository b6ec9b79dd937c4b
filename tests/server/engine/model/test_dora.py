"""DoRA adapters in a mixed batch with plain adapters and the bare base: all have PEFT's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.base.description import BaseDescription
from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected, AdapterUnavailable
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.packed import magnitudes
from adapters_store.packed.packing import pack, packed_bytes
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from server.engine.model.base_model import load_base
from server.engine.schedule import SchedulerSettings
from server.engine.startup.settings import MemoryBudget
from support.models.models import VOCAB, linear_names, peft_model, save_base
from support.models.packed_forward import PackedForward
from support.models.random_peft import save as save_random
from support.servers.service import greedy_by_peft, make_base, running
from trainer.merge import merge

FAMILIES = ("gpt2", "phi")  # a tied head, and weights stored transposed; a bias on every layer and the head
LENGTHS = (21, 5, 9, 14, 8, 11)
SLOTS = (0, None, 1, 2, 0, 3)
ENDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def save(base: Path, folder: Path, seed: int, *, dora: bool = True, **options: Any) -> Path:
    return save_random(base, folder, LoraConfig(use_dora=dora, task_type="CAUSAL_LM", **options), seed)


def save_mixed(base: Path, folder: Path) -> list[Path]:
    names = linear_names(AutoModelForCausalLM.from_pretrained(base, local_files_only=True))
    first, last = names[0], names[-1]
    saved = None if "fc1" in names else ["lm_head"]  # a head of its own has no bias of its own
    return [
        save(base, folder / "0", 0, r=4, lora_alpha=8, target_modules=[*names, "lm_head"]),
        save(base, folder / "1", 1, dora=False, r=4, lora_alpha=8, target_modules=names),
        save(base, folder / "2", 2, r=8, use_rslora=True, target_modules=names, rank_pattern={first: 2, last: 7}),
        save(base, folder / "3", 3, r=3, lora_alpha=3, target_modules=[last], modules_to_save=saved),
    ]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(base: Path, adapters: list[Path], dtype: str, *, nf4: bool = False) -> list[torch.Tensor]:
    """The prompts in two pieces, as chunked prefill cuts them, then nothing: the second reads keys of the first."""
    model = load_base(base, dtype=dtype, quantize="nf4" if nf4 else None)
    forward = PackedForward(model, adapters, num_sequences=len(SLOTS))
    requests = [forward.request(index, ids, SLOTS[index]) for index, ids in enumerate(prompts())]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


def theirs(base: Path, adapters: list[Path], dtype: torch.dtype, nf4: Any = None) -> list[torch.Tensor]:
    models = {
        slot: peft_model(base, None if slot is None else adapters[slot], dtype=dtype, nf4=nf4) for slot in set(SLOTS)
    }
    with torch.inference_mode():
        return [models[slot](torch.tensor([ids])).logits[0] for slot, ids in zip(SLOTS, prompts(), strict=True)]


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_with_dora_has_pefts_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitudes, "_PART_ELEMENTS", 1000)  # norms of some rows at a time, as of a large layer
    base = save_base(tmp_path / "base", family)
    adapters = save_mixed(base, tmp_path)
    exact, half = (theirs(base, adapters, dtype) for dtype in (torch.float32, torch.bfloat16))
    got = ours(base, adapters, "float32")
    for one, expected in zip(got, exact, strict=True):
        assert (one - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert error(ours(base, adapters, "bfloat16"), exact) <= 1.5 * error(half, exact)


def test_nf4_logits_are_pefts_on_the_same_nf4_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    adapters = save_mixed(base, tmp_path)
    nf4 = load_base(base, dtype="float32", quantize="nf4").config.quantization_config
    exact = theirs(base, adapters, torch.float32, nf4)
    for got, expected in zip(ours(base, adapters, "float32", nf4=True), exact, strict=True):
        assert (got - expected).abs().max() <= 1e-3 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_is_merged_as_peft_merges_it(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    names = linear_names(AutoModelForCausalLM.from_pretrained(base, local_files_only=True))
    adapter = save(base, tmp_path / "adapter", 4, r=4, target_modules=names)
    merged = merge(base, adapter, tmp_path / "merged", description=describe_base(base))  # judged by PEFT inside
    assert merged.parity.effect > 1e-2


def pack_of(folder: Path, base: BaseDescription) -> Any:
    return pack(plan_folder(folder, base), folder / WEIGHTS_FILE, check=True)


def test_factors_count_in_an_adapters_bytes_and_belong_to_one_base_and_its_form(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    dora, plain = (save(base, tmp_path / name, 1, dora=name == "dora", **options) for name in ("dora", "plain"))
    described = {name: describe_base(base, dtype=name) for name in ("float32", "bfloat16")}
    for one in described.values():
        more = packed_bytes(plan_folder(dora, one)) - packed_bytes(plan_folder(plain, one))
        assert more == 3 * (64 + 64) * 4  # float32, whatever the base's type
    in_nf4 = load_base(base, dtype="float32", quantize="nf4").description
    assert BaseDescription.from_json(in_nf4.to_json()) == in_nf4
    assert len({one.layout_key for one in (*described.values(), in_nf4)}) == 3
    packed = pack_of(dora, described["float32"])
    exact = load_file(dora / WEIGHTS_FILE)
    name = packed.modules[0].name
    a, b, m = (exact[f"base_model.model.{name}.{end}"] for end in ENDS)
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    norms = (weight + packed.modules[0].scale * b @ a).norm(dim=1)
    factors = magnitudes.factors_in(packed.buffer, packed.modules[0], described["float32"])
    torch.testing.assert_close(factors, m / norms, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_served_of_dora_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    description = describe_base(base)
    whole = save(base, tmp_path / "whole", 1, r=2, target_modules=["q_proj", "embed_tokens"])
    cases: list[tuple[Path, str, str, str]] = [(whole, "", "", "unsupported_dora")]
    for index, (old, new, code) in enumerate(
        [
            ('"use_dora": true', '"use_dora": false', "unsupported_dora"),
            ('"use_dora": true', '"use_dora": 1', "unsupported_dora"),
            ('"alora_invocation_tokens": null', '"alora_invocation_tokens": [5]', "unsupported_dora"),
        ]
    ):
        cases.append((save(base, tmp_path / str(index), 1, r=2, target_modules=["q_proj"]), old, new, code))
    for name, change, code in (
        ("short", lambda m: m[:-1], "wrong_shape"),
        ("nan", lambda m: m * torch.nan, "non_finite"),
    ):
        folder = save(base, tmp_path / name, 1, r=2, target_modules=["q_proj"])
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file(
            {key: change(each) if key.endswith(ENDS[2]) else each for key, each in tensors.items()},
            folder / WEIGHTS_FILE,
        )
        cases.append((folder, "", "", code))
    plain = save(base, tmp_path / "plain", 1, dora=False, r=2, target_modules=["q_proj"])
    cases.append((plain, '"use_dora": false', '"use_dora": true', "missing_magnitude"))
    for folder, old, new, code in cases:
        config = folder / CONFIG_FILE
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
        with pytest.raises(AdapterRejected) as caught:
            pack_of(folder, description)
        assert caught.value.code == code, caught.value.message
    good = save(base, tmp_path / "good", 1, r=2, target_modules=["q_proj"])
    save_base(tmp_path / "base", "llama", seed=9)
    with pytest.raises(AdapterUnavailable, match="have changed") as gone:
        pack_of(good, description)
    assert gone.value.code == "base_weights_missing"


def test_published_adapters_that_take_turns_in_the_pool_answer_as_peft_in_one_batch_with_others(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    made = dict(zip("abcd", save_mixed(base, tmp_path), strict=True))
    made["e"] = save(base, tmp_path / "4", 5, r=4, target_modules=["q_proj", "down_proj"])
    description = describe_base(base)
    sizes = [packed_bytes(plan_folder(folder, description)) for folder in made.values()]
    memory = MemoryBudget(kv_cache=4 << 20, adapter_pool=max(sizes) + 8192, host_cache=2 * max(sizes))
    prompts = {name: [(7 * ord(name) + 3 * step) % 400 + 3 for step in range(27)] for name in made}
    wanted = {name: greedy_by_peft(base, folder, prompts[name], 6) for name, folder in made.items()}
    bare = greedy_by_peft(base, None, prompts["a"], 6)
    scheduler = SchedulerSettings(max_batch_tokens=16, max_running=8)  # prompts of 27 tokens come in pieces
    with running(base, made, tmp_path / "data", memory=memory, scheduler=scheduler) as service:
        assert service.versions["a"].num_bytes == sizes[0]
        for _ in range(2):
            with service.held():
                answers = {name: service.ask(prompts[name], name, max_tokens=6)[1] for name in made}
                alone = service.ask(prompts["a"], max_tokens=6)[1]
            events = {name: answer.collect() for name, answer in answers.items()}
            assert alone.tokens() == bare
            assert {name: [token for one in each for token in one.token_ids] for name, each in events.items()} == wanted
        assert all(each[-1].num_cached_tokens == 24 for each in events.values())

"""A merged base answers as base and adapter do, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.base.description import BaseDescription
from adapters_store.base.digests import base_digest
from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.store import AdapterStore
from support.models.models import FAMILY_NAMES, VOCAB, linear_names, peft_model, save_adapter, save_base
from support.models.stored_nf4 import save_in_nf4
from trainer import merge_parity
from trainer.merge import RECORD, Merged, MergeRefused, merge

IDS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(7))


def make_adapter(base: Path, folder: Path, *, seed: int = 3, scale: float = 0.1, **changes: Any) -> Path:
    names = linear_names(AutoModelForCausalLM.from_pretrained(base, local_files_only=True))
    fields: dict[str, Any] = {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": names}
    patterns = {"rank_pattern": {names[0]: 3}, "alpha_pattern": {names[-1]: 4}}
    return save_adapter(base, folder, LoraConfig(**{**fields, **patterns, **changes}), seed=seed, scale=scale)


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Merged:
    return merge(base, adapter, out, description=describe_base(base), **options)


@torch.inference_mode()
def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    result: torch.Tensor = peft_model(base, adapter)(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_answers_as_base_and_adapter_do(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter")
    result = merged(base, adapter, tmp_path / "out")
    wanted, bare = logits(base, adapter), logits(base)
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-4)
    assert (wanted - bare).abs().max() > 1
    assert result.parity.error < 1e-5
    assert result.parity.agreement > 0.99


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_sums_are_rounded_once_to_the_bases_type(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={}, alpha_pattern={})
    result = merged(base, adapter, tmp_path / "out")
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert 0 < result.parity.error <= result.parity.tolerance == tolerance
    name = "model.layers.1.mlp.up_proj"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = weight.double() + 9 / 6**0.5 * b.double() @ a.double()
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert stored.dtype is dtype
    assert (stored.double() - wanted).abs().max() <= wanted.abs().max() * torch.finfo(dtype).eps


def test_what_is_not_targeted_stays_bit_for_bit(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], rank_pattern={}, alpha_pattern={})
    merged(base, adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)}


def test_a_base_in_several_files_keeps_its_files(tmp_path: Path) -> None:
    base = save_base(tmp_path / "whole", "llama")
    sharded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    adapter = make_adapter(sharded, tmp_path / "adapter")
    merged(sharded, adapter, tmp_path / "out")
    files = sorted(path.name for path in sharded.glob("*.safetensors*"))
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))


def test_an_untied_head_is_merged_too_and_a_tied_one_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    options: dict[str, Any] = {"target_modules": ["lm_head"], "rank_pattern": {}, "alpha_pattern": {}}
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    assert merged(base, adapter, tmp_path / "out").num_modules == 1
    tied = save_base(tmp_path / "tied", "qwen2")
    refused = make_adapter(tied, tmp_path / "refused", **options)
    with pytest.raises(MergeRefused, match="shares with its embeddings") as error:
        merged(tied, refused, tmp_path / "other")
    assert error.value.code == "tied_head"


def test_an_activated_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(MergeRefused, match="invocation tokens") as error:
        merged(base, adapter, tmp_path / "out")
    assert error.value.code == "activated_lora"


def test_an_nf4_base_is_refused_with_the_measured_error(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(MergeRefused, match=r"merging into a 4-bit base is not exact.*logits differ by [1-9]") as error:
        merged(base, adapter, tmp_path / "out", nf4=True)
    assert error.value.code == "merge_not_exact"
    assert merge_parity.compare_requantised(base, adapter).error > 10 * merge_parity.TOLERANCES["bfloat16"]
    assert not (tmp_path / "out").exists()


def test_a_base_stored_quantised_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    stored = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    with pytest.raises(MergeRefused, match="its weights are quantised") as error:
        merged(stored, adapter, tmp_path / "out")
    assert error.value.code == "base_is_quantized"


def test_an_adapter_that_would_vanish_in_rounding_is_refused(tmp_path: Path) -> None:
    """Its sum lies below half a unit of most bfloat16 weights: the logits agree well, but with the base's."""
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", scale=0.003)
    with pytest.raises(MergeRefused, match=r"of which \d\d\.\d% is lost \(at most 25%\)"):
        merged(base, adapter, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_a_wrong_sum_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr("trainer.merge._sum", lambda weight, module, adapter: weight)
    with pytest.raises(MergeRefused, match="do not answer as base and adapter do") as error:
        merged(base, adapter, tmp_path / "out")
    assert error.value.code == "merge_not_exact"
    assert list(tmp_path.glob("*out*")) == []


def test_an_adapter_without_effect_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    result = merged(base, make_adapter(base, tmp_path / "adapter", scale=0.0), tmp_path / "out")
    assert result.parity.error == result.parity.lost == 0
    assert result.digest == base_digest(base)


def test_an_existing_folder_and_a_missing_weight_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeRefused, match="exists already"):
        merged(base, adapter, tmp_path / "out")
    description = describe_base(base)
    weights = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.0.mlp.down_proj" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeRefused, match=r"down_proj\.weight: in none of the base's weight files"):
        merge(base, adapter, tmp_path / "other", description=description)


def test_the_folder_says_what_it_was_made_from(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    (base / "tokenizer_config.json").write_text("{}")
    result = merged(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["base_digest"] == base_digest(base)
    assert record["digest"] == result.digest == base_digest(tmp_path / "out") != base_digest(base)
    assert record["parity"]["error"] == result.parity.error
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


def test_adapters_of_the_old_base_are_refused_on_the_new_one_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged-base")
    old, new = describe_base(base), describe_base(tmp_path / "merged-base")
    store = AdapterStore.open(tmp_path / "data")
    store.tenants.create("acme")
    version = publish(store, adapter, old)
    with pytest.raises(
        AdapterRejected, match=rf"made for base .*{old.digest}.*this base is {new.digest} \(merged-base\)"
    ):
        publish(store, adapter, new, told=old.digest)
    with pytest.raises(Exception, match=f"belongs to base {old.digest}, asked for on base {new.digest}"):
        store.load_packed(version.digest, new)
    store.close()


def publish(store: AdapterStore, adapter: Path, base: BaseDescription, *, told: str | None = None) -> Any:
    """told: the base that the adapter's config names, as our trainer writes it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if told is not None:
        config["multilora_base_digest"] = told
    return store.publish(
        tenant="acme",
        name="style",
        config=json.dumps(config).encode(),
        weights=adapter / "adapter_model.safetensors",
        base=base,
    )

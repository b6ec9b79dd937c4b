"""The text side of models of text and pictures: a request of text has the logits that the whole model gives it, with an
adapter that PEFT trained on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from adapters_store.base import digests
from adapters_store.base.converted import door
from adapters_store.base.converted.door import folder_of, has_text_side
from adapters_store.base.families import TEXT_SIDES, UnsupportedBase
from adapters_store.errors import AdapterRejected
from server.engine.model.base_model import load_base
from support.models.packed_forward import PackedForward, pack_folder
from support.models.picture_models import CONFIGS, save_whole

PROMPT = [5, 9, 30, 41, 7, 77, 3, 120, 64]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(digests, "cache_dir", lambda: tmp_path / "cache")


def test_every_architecture_that_is_served_so_is_tested() -> None:
    assert CONFIGS.keys() == TEXT_SIDES.keys()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_text_has_the_logits_of_the_whole_model_with_pefts_adapter(architecture: str, tmp_path: Path) -> None:
    whole = save_whole(tmp_path / "whole", architecture)
    assert has_text_side(whole)
    folder = folder_of(whole)
    base = load_base(folder, dtype="float32")
    assert base.description.architecture == TEXT_SIDES[architecture]

    outer = AutoModelForImageTextToText.from_pretrained(whole, local_files_only=True, attn_implementation="eager")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|k_proj|down_proj)",
        rank_pattern={"language_model.layers.1.self_attn.q_proj": 2},
        task_type="CAUSAL_LM",
    )
    trained = get_peft_model(outer, config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path / "adapter")
    forward = PackedForward(base, [tmp_path / "adapter"], num_sequences=2)
    got = forward.logits([forward.request(0, PROMPT, 0), forward.request(1, PROMPT, None)])
    with torch.inference_mode():
        adapted = trained.eval()(input_ids=torch.tensor([PROMPT])).logits[0]
        with trained.disable_adapter():
            bare = trained(input_ids=torch.tensor([PROMPT])).logits[0]
    for ours, theirs in zip(got, (adapted, bare), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max()))
    assert (adapted - bare).abs().max() > 1e-2


def test_an_adapter_that_changes_what_sees_pictures_and_a_quantised_model_are_refused(tmp_path: Path) -> None:
    whole = save_whole(tmp_path / "whole", "Qwen3VLForConditionalGeneration")
    base = load_base(folder_of(whole), dtype="float32")
    outer = AutoModelForImageTextToText.from_pretrained(whole, local_files_only=True)
    both = LoraConfig(r=2, target_modules=["q_proj", "qkv"], task_type="CAUSAL_LM")
    get_peft_model(outer, both).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterRejected) as refused:
        pack_folder(tmp_path / "adapter", base)
    assert refused.value.code == "unknown_module"
    assert "visual" in refused.value.message

    config = whole / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(UnsupportedBase, match="a quantised model of text and pictures"):
        folder_of(whole)

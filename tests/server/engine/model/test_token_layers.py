"""Embeddings and heads that are an adapter's own (`modules_to_save`), and LoRA on the embedding: logits of a mixed
batch equal PEFT's, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.packed.packing import packed_bytes
from lora_kernels.lora.batch import LoraTable
from lora_kernels.lora.token_rows import TokenRows
from server.engine.model.base_model import load_base
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.request import Request, SamplingParams
from server.engine.schedule import ScheduledRow
from support.models.models import VOCAB, peft_model, save_base
from support.models.packed_forward import PackedForward
from support.models.random_peft import save
from trainer.merge import MergeRefused, merge

QV = ["q_proj", "v_proj"]
LENGTHS = (21, 5, 9, 14, 8, 11)
SLOTS = (0, None, 1, 2, 0, 3)
FAMILIES = ("llama", "gemma2")  # gemma2: one weight is head and embedding, and the embedding multiplies its rows


def configs(embedding: str, targets: list[str]) -> list[LoraConfig]:
    def config(rank: int, names: list[str], saved: list[str] | None = None) -> LoraConfig:
        return LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=saved, task_type="CAUSAL_LM"
        )

    return [
        config(4, targets, ["lm_head", embedding]),
        config(3, [*targets, embedding]),
        config(2, [embedding], ["lm_head"]),
        config(4, targets),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_with_own_embeddings_and_heads_has_pefts_logits(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    made = configs("embed_tokens", QV)
    adapters = [save(base, tmp_path / str(index), config, index) for index, config in enumerate(made)]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]

    def theirs(dtype: torch.dtype) -> list[torch.Tensor]:
        models = {slot: peft_model(base, None if slot is None else adapters[slot], dtype=dtype) for slot in set(SLOTS)}
        with torch.inference_mode():
            return [models[slot](torch.tensor([ids])).logits[0] for slot, ids in zip(SLOTS, prompts, strict=True)]

    def ours(dtype: str) -> list[torch.Tensor]:
        forward = PackedForward(load_base(base, dtype=dtype), adapters, num_sequences=len(SLOTS))
        requests = [forward.request(index, ids, SLOTS[index]) for index, ids in enumerate(prompts)]
        first = forward.logits(requests, [3] * len(requests))
        return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]

    exact, half, got = theirs(torch.float32), theirs(torch.bfloat16), ours("bfloat16")
    for one, expected in zip(ours("float32"), exact, strict=True):
        assert (one - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert error(got, exact) <= 1.5 * error(half, exact)


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


def saved_on(base: Path, folder: Path, grown: int = 0, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    if grown:
        model.resize_token_embeddings(VOCAB + grown)
    config = LoraConfig(**{"r": 2, "target_modules": QV, "task_type": "CAUSAL_LM", **options})
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_rows_of_its_own_count_in_an_adapters_bytes_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    description, both = describe_base(base), {"modules_to_save": ["lm_head", "model.embed_tokens"]}
    plain, own = (
        plan_folder(saved_on(base, tmp_path / name, **more), description) for name, more in {"a": {}, "b": both}.items()
    )
    assert packed_bytes(own) == packed_bytes(plain) + 2 * VOCAB * 64 * 4
    assert own.target_modules == ("embed_tokens", "lm_head", "q_proj", "v_proj")

    def lacks_it(folder: Path) -> None:
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"modules_to_save": null', '"modules_to_save": ["lm_head"]'))

    refused: list[tuple[dict[str, Any], Callable[[Path], None], str, str]] = [
        ({"grown": 8, **both}, lambda _: None, "unsupported_full_weight", "is [168, 64] and the base's is [160, 64]"),
        ({}, lacks_it, "missing_tensors", "lm_head: in modules_to_save"),
        ({**both, "alora_invocation_tokens": [5]}, lambda _: None, "unsupported_modules_to_save", "activated LoRA"),
        ({"modules_to_save": ["norm"]}, lambda _: None, "unsupported_modules_to_save", "norm"),
    ]
    for index, (options, edit, code, words) in enumerate(refused):
        folder = saved_on(base, tmp_path / str(index), **options)
        edit(folder)
        with pytest.raises(AdapterRejected) as caught:
            plan_folder(folder, description)
        assert (caught.value.code, words in caught.value.message) == (code, True), caught.value.message


def test_own_embeddings_and_heads_are_merged_and_refused_where_both_are_one_weight(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    gpt2 = save_base(tmp_path / "gpt2", "gpt2")  # whose layers' weights are stored transposed
    cases = [*((base, config) for config in configs("embed_tokens", QV)[:2]), (gpt2, configs("wte", ["c_proj"])[3])]
    for index, (folder, config) in enumerate(cases):
        adapter = save(folder, tmp_path / str(index), config, index)
        merged = merge(folder, adapter, tmp_path / f"merged{index}", description=describe_base(folder))
        assert merged.parity.effect > 1e-2
    tied = save_base(tmp_path / "tied", "qwen2")
    adapter = saved_on(tied, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(MergeRefused, match="embed_tokens") as error:
        merge(tied, adapter, tmp_path / "other", description=describe_base(tied))
    assert error.value.code == "tied_head"


def test_a_decode_step_knows_adapters_with_rows_of_their_own_and_with_factors() -> None:
    table = LoraTable(torch.zeros(256), 1, 2)
    buffers = DecodeBuffers(table, max_rows=4, max_context=16, block_size=4)
    rows = [
        ScheduledRow(Request(id=str(slot), tenant="t", prompt_ids=[1], params=SamplingParams(), slot=slot), 0, 1)
        for slot in (None, 0)
    ]
    assert not buffers.need_plain_launches(rows)
    table.set_slot(0, 64, [], [TokenRows(True, 0, 1.0, 0, 0)])
    assert buffers.need_plain_launches(rows)
    assert table.token_rows[0][0].a_offset == 64
    table.set_slot(0, 64, [(0, 0, 16, 1, 1.0)], factors=[(0, 32)])
    assert not buffers.need_plain_launches(rows)
    assert buffers.are_special(rows)
    table.clear_slot(0)
    assert not buffers.are_special(rows)

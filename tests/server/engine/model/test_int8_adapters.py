"""8-bit adapters: a batch of them, others and base rows has the logits of PEFT with the dequantised matrices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.chat_fields import DTYPE_FIELD
from adapters_store.packed.packing import pack, packed_bytes
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_kernels.lora import launcher, repacked
from server.engine.int8_probe import int8_change, int8_probe
from server.engine.model.base_model import load_base
from server.engine.model.kv_tensors import KVCache
from server.engine.text.tokenizer import Tokenizer
from support.models.models import VOCAB, peft_model, save_adapter, save_base
from support.models.packed_forward import PackedForward
from support.models.random_peft import as_int8
from support.models.random_peft import save as save_random
from support.servers.service import make_base

LENGTHS = (21, 5, 9, 14, 8, 11)
SLOTS = (0, None, 1, 2, 0, 3)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
INT8 = (0, 2)  # of the adapters


def dequantised(folder: Path, to: Path) -> Path:
    """What PEFT loads: each rank's row of A and column of B rounded to 255 levels of its own largest value."""
    to.mkdir()
    (to / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    whole = {}
    for name, values in load_file(folder / WEIGHTS_FILE).items():
        scales = values.abs().amax(dim=1 if "lora_A" in name else 0, keepdim=True) / 127
        is_magnitude = "lora_magnitude_vector" in name
        whole[name] = values if is_magnitude else torch.round(values / scales.clamp_min(1e-30)) * scales
    save_file(whole, to / WEIGHTS_FILE)
    return to


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("int8") / "base", "llama")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    """Ranks 1 to 16 on all or few layers; the first and third are int8."""
    made = [(4, ALL), (3, ALL), (16, ["q_proj", "v_proj"]), (1, ALL)]
    folders = [
        save_adapter(base, base.parent / str(index), LoraConfig(r=rank, target_modules=names), seed=index)
        for index, (rank, names) in enumerate(made)
    ]
    return [as_int8(folder) if index in INT8 else folder for index, folder in enumerate(folders)]


def as_plain(folder: Path, to: Path) -> Path:
    """The same adapter without int8."""
    to.mkdir()
    body = json.loads((folder / CONFIG_FILE).read_text())
    (to / CONFIG_FILE).write_text(json.dumps({name: body[name] for name in body if name != DTYPE_FIELD}))
    (to / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    return to


def ours(base: Path, adapters: list[Path], dtype: str) -> list[torch.Tensor]:
    forward = PackedForward(load_base(base, dtype=dtype), adapters, num_sequences=len(SLOTS))
    requests = [forward.request(index, ids, SLOTS[index]) for index, ids in enumerate(prompts())]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("native", [True, False])
def test_a_mixed_batch_has_pefts_logits_of_the_dequantised_matrices(
    native: bool, base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        for module in (launcher, repacked):
            monkeypatch.setattr(module, "native_ops", lambda dtype: None)
    theirs = [dequantised(each, tmp_path / each.name) if i in INT8 else each for i, each in enumerate(adapters)]

    def exact(dtype: torch.dtype) -> list[torch.Tensor]:
        models = {slot: peft_model(base, None if slot is None else theirs[slot], dtype=dtype) for slot in set(SLOTS)}
        with torch.inference_mode():
            return [models[slot](torch.tensor([ids])).logits[0] for slot, ids in zip(SLOTS, prompts(), strict=True)]

    expected = exact(torch.float32)
    for one, other in zip(ours(base, adapters, "float32"), expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))
    assert error(ours(base, adapters, "bfloat16"), expected) <= 1.5 * error(exact(torch.bfloat16), expected)


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


@pytest.mark.parametrize("native", [True, False])
def test_an_int8_adapter_with_dora_has_pefts_logits_of_the_dequantised_matrices(
    native: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms are those of the matrices that are served. The second adapter is the same without int8."""
    if not native:
        for module in (launcher, repacked):
            monkeypatch.setattr(module, "native_ops", lambda dtype: None)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_dora=True)
    small, whole = (save_random(base, tmp_path / name, config, 5) for name in ("small", "whole"))
    theirs = [dequantised(as_int8(small), tmp_path / "theirs"), whole]
    forward, ids = PackedForward(load_base(base, dtype="float32"), [small, whole], num_sequences=2), prompts()[0]
    got = forward.logits([forward.request(slot, ids, slot) for slot in range(2)])
    with torch.inference_mode():
        expected = [peft_model(base, adapter)(torch.tensor([ids])).logits[0] for adapter in theirs]
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))
    assert not torch.equal(got[0], got[1])


def test_rows_without_an_int8_adapter_keep_their_bits(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    plain = [as_plain(adapters[index], tmp_path / str(index)) for index in INT8]
    without = [plain[INT8.index(index)] if index in INT8 else each for index, each in enumerate(adapters)]
    pairs = zip(SLOTS, ours(base, adapters, "bfloat16"), ours(base, without, "bfloat16"), strict=True)
    for slot, one, other in pairs:
        assert torch.equal(one, other) == (slot not in INT8), slot


def test_an_int8_adapter_takes_half_the_bytes_and_is_another_adapter(base: Path, tmp_path: Path) -> None:
    for dtype, ratio in {"bfloat16": 1.9, "float32": 3.8}.items():
        description = describe_base(base, dtype=dtype)
        config = LoraConfig(r=16, target_modules=ALL)
        folder = save_adapter(base, tmp_path / dtype, config, seed=1)
        plain = plan_folder(folder, description)
        small = plan_folder(as_int8(folder), description)
        one, other = (pack(plan, folder / WEIGHTS_FILE, check=True) for plan in (plain, small))
        assert one.num_bytes == packed_bytes(plain) >= ratio * packed_bytes(small) == ratio * other.num_bytes
        assert (one.is_int8, other.is_int8, one.digest == other.digest) == (False, True, False)


def test_another_dtype_is_refused_by_name(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    for value in ("int4", 8, ["int8"], True):
        body = json.loads((adapters[0] / CONFIG_FILE).read_text()) | {DTYPE_FIELD: value}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(body))
        (tmp_path / WEIGHTS_FILE).write_bytes((adapters[0] / WEIGHTS_FILE).read_bytes())
        with pytest.raises(AdapterRejected, match="adapter_dtype: must be int8") as refused:
            plan_folder(tmp_path, describe_base(base))
        assert refused.value.code == "unknown_adapter_dtype"


def test_factors_that_are_not_finite_are_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes((adapters[0] / CONFIG_FILE).read_bytes())
    tensors = {name: values.fill_(1e30) for name, values in load_file(adapters[0] / WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRejected, match="in int8") as refused:
        pack(plan_folder(tmp_path, describe_base(base, dtype="bfloat16")), tmp_path / WEIGHTS_FILE)
    assert refused.value.code == "cast_overflow"


def test_the_probe_is_the_divergence_of_both_forms(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    loaded, ids = load_base(base, dtype="float32"), prompts()[0]

    def change(folder: Path) -> float:
        plan = plan_folder(folder, loaded.description)
        plain, small = (pack(replace(plan, is_int8=int8), folder / WEIGHTS_FILE) for int8 in (False, True))
        return int8_change(loaded, plain, small, ids)

    both = PackedForward(loaded, [as_plain(adapters[0], tmp_path / "plain"), adapters[0]])
    before, after = (
        torch.log_softmax(logits, dim=-1) for logits in both.logits([both.request(i, ids, i) for i in range(2)])
    )
    divergence = float((before.exp() * (before - after)).sum(dim=-1).mean())
    shift = float((after - before)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().abs())
    assert change(adapters[0]) == pytest.approx(max(divergence, shift), rel=1e-3, abs=1e-7)
    assert 0 < change(adapters[0]) <= 0.01
    coarse = as_plain(adapters[0], tmp_path / "coarse")
    tensors = load_file(coarse / WEIGHTS_FILE)
    for name, values in tensors.items():
        if "lora_A" in name:
            values[:, 0] = 30.0  # one number of each row leaves no levels for the others
    save_file(tensors, coarse / WEIGHTS_FILE)
    assert change(coarse) > 0.01


def test_an_adapter_that_the_device_has_no_memory_to_measure_is_refused_and_the_engine_goes_on(
    base: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error other than a refusal would end the engine's thread."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded, tokenizer = load_base(base, dtype="float32"), Tokenizer.load(make_base(base.parent / "with tokenizer"))
    plan = plan_folder(adapters[0], loaded.description)
    packed = pack(plan, adapters[0] / WEIGHTS_FILE)
    probe = int8_probe(loaded, tokenizer, tokenizer.vocabulary(loaded.num_embeddings))
    monkeypatch.setattr(KVCache, "allocate", full)
    with pytest.raises(AdapterRejected, match="MiB of the device's memory") as refused:
        probe(packed, packed)
    assert refused.value.code == "int8_not_measured"

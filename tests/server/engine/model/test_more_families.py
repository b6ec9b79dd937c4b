"""Families that are a row of data: logits of a mixed batch equal PEFT's in float32, bfloat16 and NF4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from adapters_store.base.families import FAMILIES, UnsupportedBase
from lora_kernels.native.bindings import native_ops
from server.engine.model.base_model import load_base
from support.models.models import (
    FAMILY_NAMES,
    MORE_FAMILY_NAMES,
    VOCAB,
    adapter_configs,
    config_of,
    linear_names,
    peft_model,
    save_adapter,
    save_base,
)
from support.models.packed_forward import PackedForward

KINDS = ("rslora", "patterns")
SLOTS = (0, None, 1, 0)
LENGTHS = (41, 5, 17, 30)


@pytest.fixture(scope="module", params=MORE_FAMILY_NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp(str(request.param))
    base = save_base(folder / "base", request.param)
    names = linear_names(AutoModelForCausalLM.from_pretrained(base, local_files_only=True))
    configs = adapter_configs(names)
    return base, [save_adapter(base, folder / kind, configs[kind], seed=index) for index, kind in enumerate(KINDS)]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(
    base: Path, adapters: list[Path], dtype: str, *, quantize: str | None = None, slots: Sequence[int | None] = SLOTS
) -> list[torch.Tensor]:
    """The batch's prompts in two pieces, as chunked prefill cuts them, so that the second reads keys of the first."""
    forward = PackedForward(load_base(base, dtype=dtype, quantize=quantize), adapters, num_sequences=len(SLOTS))
    requests = [forward.request(index, tokens, slots[index]) for index, tokens in enumerate(prompts())]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


def theirs(models: dict[int | None, torch.nn.Module]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [models[slot](torch.tensor([tokens])).logits[0] for slot, tokens in zip(SLOTS, prompts(), strict=True)]


def pefts(base: Path, adapters: list[Path], dtype: torch.dtype) -> list[torch.Tensor]:
    return theirs(
        {slot: peft_model(base, adapters[slot] if slot is not None else None, dtype=dtype) for slot in set(SLOTS)}
    )


def test_every_served_architecture_is_tested_against_peft() -> None:
    """Here, or in tests/server/engine/test_exactness.py."""
    tested = {type(config_of(name)).model_type for name in (*FAMILY_NAMES, *MORE_FAMILY_NAMES)}
    served = {getattr(transformers, name).config_class.model_type for name in FAMILIES}
    assert tested == served


def test_float32_and_bfloat16_logits_are_pefts(family: tuple[Path, list[Path]]) -> None:
    exact = pefts(*family, torch.float32)
    for got, expected in zip(ours(*family, "float32"), exact, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    bare = theirs(dict.fromkeys(set(SLOTS), peft_model(family[0], None)))
    assert (bare[0] - exact[0]).abs().max() > 1e-2  # the adapter does something
    our_error = _error(ours(*family, "bfloat16"), exact)
    assert our_error <= 1.5 * _error(pefts(*family, torch.bfloat16), exact)


def test_logits_are_not_rounded_to_the_type_of_the_base(family: tuple[Path, list[Path]]) -> None:
    native = native_ops(torch.bfloat16)
    if native is None or not native.linear_max_rows:
        pytest.skip("the library's product rounds, and this machine has no product of ours")
    for logits in ours(*family, "bfloat16"):
        assert logits.dtype is torch.float32
        assert (logits.bfloat16().float() != logits).float().mean() > 0.9


def _error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((one.float() - other).pow(2).mean()) for one, other in zip(got, exact, strict=True)) ** 0.5


def test_nf4_logits_are_pefts_on_the_same_nf4_base(family: tuple[Path, list[Path]]) -> None:
    base, adapters = family
    nf4 = load_base(base, dtype="float32", quantize="nf4").config.quantization_config
    models = {slot: peft_model(base, None if slot is None else adapters[slot], nf4=nf4) for slot in set(SLOTS)}
    for got, expected in zip(ours(base, adapters, "float32", quantize="nf4"), theirs(models), strict=True):
        assert (got - expected).abs().max() <= 1e-3 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("stray", [{"num_key_value_heads": 2}, {"head_dim": 8}])
def test_a_size_that_the_architecture_does_not_read_cannot_shrink_the_cache(
    tmp_path: Path, stray: dict[str, int]
) -> None:
    """GPT-NeoX has as many key heads as heads, whatever its config.json says beside that."""
    base = save_base(tmp_path, "gpt-neox", **stray)
    with pytest.raises(UnsupportedBase, match="GPTNeoXAttention makes"):
        ours(base, [], "float32", slots=(None,) * len(SLOTS))

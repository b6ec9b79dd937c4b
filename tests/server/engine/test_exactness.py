"""Each row of a mixed batch gets the logits that PEFT gives it alone: every family, precision and kind of adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.common.popularity import POPULARITIES, choose_adapters
from server.engine.model.base_model import load_base
from support.models.models import (
    FAMILY_NAMES,
    VOCAB,
    adapter_configs,
    peft_model,
    save_adapter,
    save_adapters,
    save_base,
)
from support.models.packed_forward import PackedForward

NUM_ROWS = 8


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(str(request.param))
    base = save_base(folder / "base", request.param)
    return base, save_adapters(base, folder / "adapters")


def prompts(count: int = NUM_ROWS, seed: int = 0) -> list[list[int]]:
    """Token rows of odd lengths 3..59."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def oracle_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float()


oracle_model = cache(lambda base, adapter, dtype: peft_model(base, adapter, dtype=dtype))  # the same for many tests


def oracle(
    base: Path, adapters: dict[str, Path], dtype: torch.dtype
) -> Callable[[int | None, list[int]], torch.Tensor]:
    """(slot or None, tokens) -> PEFT's logits with that one adapter."""
    paths = list(adapters.values())
    return lambda slot, tokens: oracle_logits(oracle_model(base, None if slot is None else paths[slot], dtype), tokens)


def slots_for(popularity: str, num_adapters: int) -> list[int | None]:
    """Adapters by popularity, every fourth row on the base alone."""
    chosen = choose_adapters(popularity, NUM_ROWS, num_adapters, seed=1)  # type: ignore[arg-type]
    return [None if index % 4 == 3 else slot for index, slot in enumerate(chosen)]


def test_fp32_logits_of_a_mixed_batch_equal_peft_alone(family: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = family
    expected = oracle(base, adapters, torch.float64)  # in float32 PEFT's own logits are off by 0.8e-4 with LongRoPE
    forward = PackedForward(load_base(base, dtype="float32"), list(adapters.values()), num_sequences=NUM_ROWS)
    for popularity in POPULARITIES:
        slots, rows = slots_for(popularity, len(adapters)), prompts()
        requests = [forward.request(index, rows[index], slots[index]) for index in range(NUM_ROWS)]
        for slot, tokens, got in zip(slots, rows, forward.logits(requests), strict=True):
            assert (got - expected(slot, tokens)).abs().max() <= 1e-4


def test_fp32_logits_do_not_depend_on_how_the_prompt_is_cut(family: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = family
    expected = oracle(base, adapters, torch.float32)
    forward = PackedForward(load_base(base, dtype="float32"), list(adapters.values()), num_sequences=NUM_ROWS)
    slots, rows = slots_for("uniform", len(adapters)), prompts(seed=5)
    requests = [forward.request(index, rows[index], slots[index]) for index in range(NUM_ROWS)]
    pieces: list[list[torch.Tensor]] = [[] for _ in requests]
    step = 0
    while any(request.num_computed_tokens < request.num_tokens for request in requests):
        left = [request.num_tokens - request.num_computed_tokens for request in requests]
        counts = [min(remaining, 1 + (index + step) % 9) for index, remaining in enumerate(left)]
        active = [index for index, count in enumerate(counts) if count]
        for index, got in zip(active, forward.logits(requests, counts), strict=True):
            pieces[index].append(got)
        step += 1
    for slot, tokens, got in zip(slots, rows, pieces, strict=True):
        assert (torch.cat(got) - expected(slot, tokens)).abs().max() <= 1e-4


def test_bf16_error_is_no_worse_than_pefts(family: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = family
    exact = oracle(base, adapters, torch.float32)
    peft = oracle(base, adapters, torch.bfloat16)
    forward = PackedForward(load_base(base, dtype="bfloat16"), list(adapters.values()), num_sequences=NUM_ROWS)
    slots, rows = slots_for("distinct", len(adapters)), prompts()
    requests = [forward.request(index, rows[index], slots[index]) for index in range(NUM_ROWS)]
    ours_error, peft_error = 0.0, 0.0
    for slot, tokens, got in zip(slots, rows, forward.logits(requests), strict=True):
        ours_error += float((got.float() - exact(slot, tokens)).pow(2).mean())
        peft_error += float((peft(slot, tokens) - exact(slot, tokens)).pow(2).mean())
    assert ours_error**0.5 <= 1.5 * peft_error**0.5


def test_zero_b_adapter_is_bit_equal_to_the_base(family: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, _ = family
    config = next(iter(adapter_configs(["q_proj", "o_proj"] if "phi3" not in str(base) else ["o_proj"]).values()))
    adapter = save_adapter(base, tmp_path / "zero", config, seed=0, scale=0.0)
    forward = PackedForward(load_base(base, dtype="bfloat16"), [adapter], num_sequences=4)
    tokens = prompts(1)[0]
    rows = [forward.request(0, tokens, 0), forward.request(1, tokens, None)]
    with_adapter, bare = forward.logits(rows)
    assert torch.equal(with_adapter, bare)


def test_adapter_on_the_untied_head_applies_to_the_rows_that_need_logits(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    config = adapter_configs(["lm_head", "q_proj"])["plain"]
    adapter = save_adapter(base, tmp_path / "adapter", config, seed=3)
    forward = PackedForward(load_base(base, dtype="float32"), [adapter], num_sequences=4)
    rows = prompts(3)
    got = forward.logits([forward.request(index, tokens, (None, 0, 0)[index]) for index, tokens in enumerate(rows)])
    for index, tokens in enumerate(rows):
        model = peft_model(base, adapter if index else None)
        assert (got[index] - oracle_logits(model, tokens)).abs().max() <= 1e-4


def test_nf4_logits_equal_peft_on_the_same_nf4_base(family: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = family
    ours = load_base(base, dtype="float32", quantize="nf4")
    forward = PackedForward(ours, list(adapters.values()), num_sequences=NUM_ROWS)
    slots, rows = slots_for("distinct", len(adapters)), prompts()
    requests = [forward.request(index, rows[index], slots[index]) for index in range(NUM_ROWS)]
    got = forward.logits(requests)
    quantization = ours.config.quantization_config
    for slot in {slots[0], slots[1], None}:
        model = peft_model(base, None if slot is None else list(adapters.values())[slot], nf4=quantization)
        for index in (index for index in range(NUM_ROWS) if slots[index] == slot):
            assert (got[index] - oracle_logits(model, rows[index])).abs().max() <= 1e-3

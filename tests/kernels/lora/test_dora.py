"""DoRA's factors multiply an adapter's rows alone: product and delta, not the bias; other rows keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_kernels.lora import launcher
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraGroup
from lora_kernels.lora.launcher import add_lora_delta, group_linear
from lora_kernels.lora.reference import dora_reference
from lora_kernels.native.bindings import native_ops
from support.models.lora import random_table

GROUP = LoraGroup((0, 1, 2), 96, (80, 33, 200))
OUT = sum(GROUP.out_features)
RANKS = (1, 16, 3, 64, 5)
FACTORED = (1, 2, 4)
SLOTS = [1, 0, NO_ADAPTER, 2, 3, 4, 1, 1]


@pytest.fixture(params=["native", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        assert native_ops(torch.float32) is not None, "the C kernels are built where tests run"
    else:
        monkeypatch.setattr(launcher, "native_ops", lambda dtype: None)


def rows(count: int, *, without: tuple[int, ...] = ()) -> np.ndarray:
    slots = np.array((SLOTS * count)[:count], dtype=np.int32)
    return np.where(np.isin(slots, without), NO_ADAPTER, slots).astype(np.int32)


@pytest.mark.parametrize("num_rows", [1, 8, 31, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_multiply_product_and_delta_of_their_rows(num_rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = (torch.randn(OUT, 96, generator=generator) * 0.1).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(num_rows, 96, generator=generator).to(dtype)
    plain, mixed = (random_table([GROUP], RANKS, dtype, factored=of) for of in ((), FACTORED))
    slots, batch = rows(num_rows), LoraBatch(mixed, rows(num_rows))
    base = x.float() @ weight.float().T + (0 if bias is None else bias.float())

    got = group_linear(x, weight, bias, batch, GROUP)
    exact = dora_reference(base, x, batch, GROUP, bias)
    limit = 1e-5 if dtype is torch.float32 else 2.0**-7
    assert float((got.float() - exact).abs().max() / exact.abs().max()) <= limit

    others = ~np.isin(slots, FACTORED)
    alone = LoraBatch(mixed, rows(num_rows, without=FACTORED))
    assert torch.equal(got[others], group_linear(x, weight, bias, alone, GROUP)[others])
    if num_rows == 8:
        unscaled = group_linear(x, weight, bias, LoraBatch(plain, slots), GROUP)
        assert not torch.allclose(got[~others].float(), unscaled[~others].float(), atol=0.05)
        apart = add_lora_delta(base.to(dtype), x, batch, GROUP, bias).float()
        assert float((apart - exact).abs().max() / exact.abs().max()) <= limit


def test_a_step_without_dora_hands_no_factors_to_the_kernels() -> None:
    table = random_table([GROUP, LoraGroup((3,), 96, (16,))], RANKS, torch.float32, factored=FACTORED)
    plain, mixed = (LoraBatch(table, rows(8, without=without)) for without in (FACTORED, ()))
    assert (plain.scales(GROUP), mixed.scales(GROUP)) == (False, True)
    assert plain._native[0].factors is None
    for slot in FACTORED:
        table.clear_slot(slot)
    cleared = LoraBatch(table, rows(8))
    assert not cleared.scales(GROUP)
    assert not table.factors.any()

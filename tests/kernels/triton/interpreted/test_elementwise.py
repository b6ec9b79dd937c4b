"""RMSNorm, SwiGLU and RoPE in Triton round exactly where transformers' do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lora_kernels.elementwise.launcher import add_rms_norm, rms_norm, rope_in_place, silu_mul
from lora_kernels.triton_common.available import triton_switch
from support.kernels.triton_cases import normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    triton_switch().on_cpu = True
    yield
    triton_switch().on_cpu = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 500), (3, 7, 2, 16), (1, 40, 1024), (1, 3, 5000)])
def test_rms_norm_equals_transformers_within_one_rounding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal(*shape, dtype=dtype) * 3
    module = LlamaRMSNorm(shape[-1], eps=1e-6).to(dtype)
    torch.nn.init.normal_(module.weight, 1.0, 0.3)
    got = rms_norm(x, module.weight.detach(), 1e-6)
    torch.testing.assert_close(got, module(x).detach(), rtol=2 * ONE_ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 500), (3, 7, 2, 16), (1, 3, 5000)])
def test_gemmas_rms_norm_equals_transformers_within_one_rounding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal(*shape, dtype=dtype) * 3
    module = Gemma2RMSNorm(shape[-1], eps=1e-6).to(dtype)
    torch.nn.init.normal_(module.weight, 0.2, 0.3)
    got = rms_norm(x, module.weight.detach(), 1e-6, one_plus=True)
    torch.testing.assert_close(got, module(x).detach(), rtol=ONE_ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 37, 500), (1, 3, 5000)])
def test_sum_and_norm_in_one_pass_are_those_of_two(
    dtype: torch.dtype, one_plus: bool, shape: tuple[int, int, int]
) -> None:
    x, residual = (normal(*shape, dtype=dtype, seed=seed) * 3 for seed in (0, 1))
    weight = normal(shape[-1], dtype=dtype, seed=2)
    total, normed = add_rms_norm(x, residual, weight, 1e-6, one_plus=one_plus)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(residual + x, weight, 1e-6, one_plus=one_plus))


def test_heads_inside_a_fused_projection_are_normed_where_they_lie() -> None:
    fused = normal(1, 9, 8 * 32, dtype=torch.bfloat16)
    heads = fused[..., 64:192].view(1, 9, 4, 32)
    weight = normal(32, dtype=torch.bfloat16)
    assert torch.equal(
        rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous().view(-1, 32), weight, 1e-6).view(1, 9, 4, 32)
    )


def test_nan_stays_in_its_row() -> None:
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    y = rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 66), (2, 5000)])
def test_silu_mul_equals_torch_within_one_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = normal(*shape, dtype=dtype) * 8
    x[0, 0], x[-1, 0] = -200.0, 200.0  # exp would overflow
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(silu_mul(x), silu(gate) * up, rtol=2 * ONE_ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(1, 1, 8), (3, 5, 64), (8, 9, 128), (2, 3, 80)])
def test_rope_equals_transformers(dtype: torch.dtype, heads: int, tokens: int, head_dim: int) -> None:
    fused = normal(1, tokens, 2 * heads * head_dim, dtype=dtype)
    q, k = (part.view(1, tokens, heads, head_dim).transpose(1, 2) for part in fused.chunk(2, dim=-1))
    angles = (normal(1, tokens, head_dim // 2, dtype=torch.float32, seed=2) * 3).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    assert rope_in_place(q, cos, sin)
    assert rope_in_place(k, cos, sin)
    tolerance = 1e-6 if dtype is torch.float32 else 0.0
    torch.testing.assert_close(q, expected_q, rtol=0, atol=tolerance)
    torch.testing.assert_close(k, expected_k, rtol=0, atol=tolerance)


def test_a_partial_rotation_leaves_the_rest_of_the_head() -> None:
    x = normal(1, 2, 3, 64, dtype=torch.float32)
    before = x.clone()
    angles = normal(1, 3, 8, dtype=torch.float32).repeat(1, 1, 2)
    assert rope_in_place(x, angles.cos(), angles.sin())
    assert torch.equal(x[..., 16:], before[..., 16:])
    assert not torch.equal(x[..., :16], before[..., :16])

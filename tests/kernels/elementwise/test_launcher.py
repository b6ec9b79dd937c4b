"""RMSNorm and SwiGLU round exactly where transformers' do; a mask of tokens touches its own rows and bits alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lora_kernels.elementwise.launcher import forbid_tokens, rms_norm, rope_in_place, silu_mul
from lora_kernels.elementwise.reference import forbid_tokens_reference, rms_norm_reference, silu_mul_reference
from lora_kernels.native.bindings import native_ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 500), (3, 7, 2, 16), (1, 40, 1024)])
def test_equals_transformers_within_one_rounding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    module = LlamaRMSNorm(shape[-1], eps=1e-6).to(dtype)
    torch.nn.init.normal_(module.weight, 1.0, 0.3)
    got = rms_norm(x, module.weight.detach(), 1e-6)
    torch.testing.assert_close(got, module(x), rtol=1e-6 if dtype is torch.float32 else 2**-7, atol=1e-6)
    assert torch.equal(rms_norm_reference(x, module.weight, 1e-6), module(x))


def test_nan_stays_nan_and_other_rows_stay_finite() -> None:
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    y = rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6)
    assert y[1].isnan().all()
    assert torch.isfinite(y[0]).all()
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 66), (40, 1000)])
def test_silu_mul_equals_torch_within_one_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 8).to(dtype)
    x[0, 0] = -200.0  # exp would overflow
    x[-1, 0] = 200.0
    expected = silu_mul_reference(x)
    torch.testing.assert_close(silu_mul(x), expected, rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-6)


def test_silu_mul_lets_nan_through() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = torch.nan
    y = silu_mul(x)
    assert y[0, 3].isnan()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(1, 1, 8), (3, 5, 64), (8, 40, 128), (2, 3, 80)])
def test_rope_equals_transformers(dtype: torch.dtype, heads: int, tokens: int, head_dim: int) -> None:
    if native_ops(dtype) is None:
        pytest.skip("no C compiler")
    generator = torch.Generator().manual_seed(heads)
    fused = torch.randn(1, tokens, 2 * heads * head_dim, generator=generator).to(dtype)
    q, k = (part.view(1, tokens, heads, head_dim).transpose(1, 2) for part in fused.chunk(2, dim=-1))
    angles = (torch.randn(1, tokens, head_dim // 2, generator=generator) * 3).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    assert rope_in_place(q, cos, sin)
    assert rope_in_place(k, cos, sin)
    tolerance = 1e-6 if dtype is torch.float32 else 0.0  # float32 sums are fused, bfloat16 products rounded as torch's
    torch.testing.assert_close(q, expected_q, rtol=0, atol=tolerance)
    torch.testing.assert_close(k, expected_k, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 63), (4, 64), (5, 500), (33, 8191), (2, 70_000)])
def test_forbidden_tokens_of_the_listed_rows_and_nothing_else_become_minus_infinity(
    dtype: torch.dtype, rows: int, vocab: int
) -> None:
    rng = np.random.default_rng(rows)
    num_bytes = -(-(vocab + 1) // 32) * 4  # a tokenizer's table may be one wider, and is padded to whole words
    allowed_CB = rng.integers(0, 256, (-(-rows // 2), num_bytes), dtype=np.uint8)
    allowed_CB[:, : num_bytes // 4], allowed_CB[:, num_bytes // 2 :] = 0, 0xFF
    allowed_CB[0, -num_bytes // 4 :] = 0
    rows_C = torch.from_numpy(rng.permutation(rows)[: len(allowed_CB)])
    scores_RV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores_RV[-1, -1] = torch.nan
    expected, by_reference = scores_RV.clone(), scores_RV.clone()
    for row, bits_B in zip(rows_C.tolist(), allowed_CB, strict=True):
        is_allowed_V = np.unpackbits(bits_B, bitorder="little")[:vocab].astype(bool)
        expected[row, torch.from_numpy(~is_allowed_V)] = -torch.inf
    forbid_tokens_reference(by_reference, rows_C, torch.from_numpy(allowed_CB))
    torch.testing.assert_close(by_reference, expected, rtol=0, atol=0, equal_nan=True)
    around = torch.full((rows + 2, vocab), 7.0).to(dtype)
    around[1:-1] = scores_RV
    forbid_tokens(around[1:-1], rows_C, torch.from_numpy(allowed_CB))
    torch.testing.assert_close(around[1:-1], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(around[[0, -1]], torch.full((2, vocab), 7.0).to(dtype))

"""A base that would fail every request, or answer all of them alike, does not start; the tensor to blame is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.families import UnsupportedBase
from support.models.models import FAMILY_NAMES
from support.servers.service import TENANT, make_base, running

Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.input_layernorm.weight"


def change(base: Path, edit: Callable[[Tensors], None]) -> Path:
    file = base / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return base


def nan_in_a_norm(tensors: Tensors) -> None:
    tensors[NORM][3] = torch.nan


def infinity_in_a_matrix(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"][1, 2] = torch.inf


def nan_in_the_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"][100] = torch.nan


def overflow(tensors: Tensors) -> None:
    tensors["lm_head.weight"] *= 3e38


def zeros(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def a_deaf_embedding(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][0]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (nan_in_a_norm, f"logits are not finite on a prompt of 4 tokens; {NORM} holds NaN or infinity"),
        (infinity_in_a_matrix, "not finite on a prompt of 4 tokens; model.layers.2.mlp.down_proj.weight holds"),
        (nan_in_the_head, "not finite on a prompt of 4 tokens; lm_head.weight holds NaN or infinity"),
        (overflow, "not finite on a prompt of 4 tokens; "),
        (zeros, "two different prompts get the same logits; every tensor is finite: the weights may be zero"),
        (a_deaf_embedding, "two different prompts get the same logits; every tensor is finite"),
    ],
)
def test_a_base_that_cannot_answer_is_refused_at_start_by_name(
    tmp_path: Path, edit: Callable[[Tensors], None], words: str
) -> None:
    base = change(make_base(tmp_path / "spoilt"), edit)
    with pytest.raises(UnsupportedBase) as refusal, running(base, {}, tmp_path / "data"):
        pytest.fail("it started")
    assert str(refusal.value).startswith("spoilt: ")
    assert words in str(refusal.value)


def test_a_row_without_a_token_may_hold_anything(tmp_path: Path) -> None:
    """It is never sampled, so the base can be served."""

    def spoil_padding(tensors: Tensors) -> None:
        tensors["lm_head.weight"][419] = torch.nan

    base = change(make_base(tmp_path / "base"), spoil_padding)
    with running(base, {}, tmp_path / "data") as service:
        assert len(service.tokens([7, 8, 9], logprobs=3, prompt_logprobs=1)) == 16


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_sound_base_starts_and_the_probe_leaves_no_trace(tmp_path: Path, family: str) -> None:
    with running(make_base(tmp_path / "base", family), {}, tmp_path / "data", block_size=2) as service:
        pool, cache = service.parts.engine.scheduler.pool, service.parts.engine._runner.cache  # type: ignore[attr-defined]
        assert pool.num_free == pool.num_blocks
        assert len(pool._cache) == 0
        assert all(not layer.keys.any() and not layer.values.any() for layer in cache.layers)
        assert service.ask([5, 6, 7], tenant=TENANT, max_tokens=1)[1].tokens()

"""Singular values are those of the whole update, and each kind of broken adapter is called by its name."""

from __future__ import annotations

import pytest
import torch

from trainer.gate.spectrum import ModuleWeights, judge_spectrum, spectrum_of
from trainer.gate.thresholds import GateThresholds

LIMITS = GateThresholds()


def weights(
    *, rank: int = 8, size: float = 0.01, scale: float = 2.0, base_norm: float | None = 10.0, seed: int = 0
) -> ModuleWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 40, generator=generator), torch.randn(30, rank, generator=generator) * size
    return ModuleWeights("model.layers.0.mlp.up_proj", a, b, scale, base_norm)


def codes(*modules: ModuleWeights) -> list[tuple[str, str]]:
    return [(reason.code, reason.level) for reason in judge_spectrum([spectrum_of(item) for item in modules], LIMITS)]


def test_singular_values_and_norm_are_those_of_the_whole_update() -> None:
    module = weights()
    update = module.scale * module.b @ module.a
    found = spectrum_of(module)
    expected = torch.linalg.svdvals(update)[:8]
    assert found.singular_values == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.norm == pytest.approx(float(update.norm()), rel=1e-5)
    assert found.relative_norm == pytest.approx(float(update.norm()) / 10, rel=1e-5)


def test_effective_rank_counts_directions() -> None:
    orthogonal = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(1))).Q.T
    even = spectrum_of(ModuleWeights("m", orthogonal, torch.eye(30)[:, :8], 1.0))
    assert even.effective_rank == pytest.approx(8, rel=1e-4)
    one = weights()
    collapsed = spectrum_of(ModuleWeights("m", one.a, one.b[:, :1] @ torch.ones(1, 8), 1.0))
    assert collapsed.effective_rank == pytest.approx(1, abs=1e-3)


def test_a_sound_adapter_has_nothing_against_it() -> None:
    assert codes(*(weights(seed=seed) for seed in range(4))) == []
    assert codes(weights(base_norm=None)) == []


def test_each_broken_adapter_is_called_by_its_name() -> None:
    sound = weights()
    assert codes(weights(size=0.0)) == [("no_effect", "block")]
    assert codes(weights(size=100.0)) == [("exploding_norm", "block")]
    assert codes(weights(size=0.3)) == [("large_update", "warn")]
    assert codes(weights(scale=32.0, size=0.001)) == [("unusual_alpha", "warn")]
    collapsed = ModuleWeights("m", sound.a, sound.b[:, :1] @ torch.ones(1, 8), 1.0)
    assert codes(collapsed) == [("rank_collapse", "warn")]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_block_and_name_the_layer(value: float) -> None:
    broken = weights()
    broken.b[3, 2] = value
    reasons = judge_spectrum([spectrum_of(weights()), spectrum_of(broken)], LIMITS)
    assert [(reason.code, reason.level, reason.value) for reason in reasons] == [("non_finite_weights", "block", 1)]
    assert "mlp.up_proj" in reasons[0].message
    assert spectrum_of(broken).to_mapping()["singular_values"] is None


def test_experts_that_no_text_reached_are_no_collapse() -> None:
    idle = weights()
    idle.b.zero_()
    assert codes(weights(), idle, idle, idle) == []
    assert codes(idle, idle) == [("no_effect", "block")]


def test_rank_one_and_two_adapters_are_not_called_collapsed() -> None:
    assert codes(weights(rank=1), weights(rank=2)) == []

"""Logits of a base that 2 or 4 processes share are one process's, plain and in NF4, with adapters of every kind, and
adapters add no sum.

The ranks are real processes over gloo; one set of them serves every base of a test run in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from adapters_store.base.families import UnsupportedBase
from server.engine.model.base_model import BaseModel, load_base
from server.engine.tensor_parallel.leader import Leader
from server.engine.tensor_parallel.sharded_base import cuts_of
from support.models.models import (
    FAMILY_NAMES,
    MORE_FAMILY_NAMES,
    VOCAB,
    adapter_configs,
    linear_names,
    save_adapter,
    save_base,
)
from support.models.packed_forward import PackedForward
from support.models.random_peft import as_int8
from support.models.random_peft import save as save_random
from support.models.stored_nf4 import save_in_nf4

KINDS = ("rslora", "patterns", "subset")
SLOTS = (0, None, 1, 2, 0, 3)
BARE = (None,) * len(SLOTS)
LENGTHS = (41, 5, 17, 30, 8, 11)
SUMS_OF_NORMS = {"olmo2": 2}  # of a layer, beside those after attention and MLP
LIMIT = 1e-5  # of the largest logit


@pytest.fixture(scope="module", params=[2, 4])
def leader(request: pytest.FixtureRequest) -> Iterator[Leader]:
    leader = Leader(request.param, torch.device("cpu"), timeout_s=600)  # a machine may stop all of them for a while
    yield leader
    leader.close()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def logits_of(forward: PackedForward, slots: tuple[int | None, ...]) -> list[torch.Tensor]:
    """The prompts in two pieces, so that the second reads keys of the first."""
    requests = [forward.request(index, ids, slots[index]) for index, ids in enumerate(prompts())]
    first = forward.logits(requests, [3] * len(requests))
    return [torch.cat(parts) for parts in zip(first, forward.logits(requests), strict=True)]


@dataclass(frozen=True)
class OneProcess:
    """A base with its adapters, and the logits of one process: of bare rows, and of the mixed batch."""

    base: Path
    quantize: str | None
    adapters: list[Path]
    slots: tuple[int | None, ...]
    bare: list[torch.Tensor]
    mixed: list[torch.Tensor]

    @classmethod
    def of(cls, base: Path, adapters: list[Path], quantize: str | None = None) -> OneProcess:
        loaded = load_base(base, dtype="float32", quantize=quantize)
        forward = PackedForward(loaded, adapters, num_sequences=len(SLOTS))
        slots = tuple(None if slot is None or slot >= len(adapters) else slot for slot in SLOTS)
        bare, mixed = logits_of(forward, BARE), logits_of(forward, slots)
        assert (torch.cat(bare) - torch.cat(mixed)).abs().max() > 1e-3, "the adapters do nothing"
        return cls(base, quantize, adapters, slots, bare, mixed)


def shared_base(leader: Leader, path: Path, quantize: str | None = None) -> BaseModel:
    cuts = cuts_of(path, leader.num_ranks, dtype="float32", quantize=quantize)
    return leader.load_base(path, cuts, num_threads=1)


def assert_ranks_equal(leader: Leader, one: OneProcess) -> None:
    """In float32, and adapters add no sum."""
    shared = shared_base(leader, one.base, one.quantize)
    forward = PackedForward(shared, one.adapters, num_sequences=len(SLOTS), leader=leader)
    counts = []
    for slots, expected in ((BARE, one.bare), (one.slots, one.mixed)):
        before = leader.ranks.num_sums
        for got, logits_TV in zip(logits_of(forward, slots), expected, strict=True):
            assert (got - logits_TV).abs().max() <= LIMIT * logits_TV.abs().max()
        counts.append(leader.ranks.num_sums - before)
    assert counts[0] == counts[1] > 0


MakeOne = Callable[[str, str | None], OneProcess]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> MakeOne:
    """Of a family, plain or in NF4; 2 and 4 ranks are compared with the same."""

    @cache
    def made(family: str, quantize: str | None) -> OneProcess:
        folder = tmp_path_factory.mktemp(family)
        base = save_base(folder / "base", family, **divisible(family, quantize))
        model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
        configs = adapter_configs(linear_names(model))
        adapters = [save_adapter(base, folder / kind, configs[kind], seed=seed) for seed, kind in enumerate(KINDS)]
        return OneProcess.of(base, adapters, quantize)

    return made


def divisible(family: str, quantize: str | None = None) -> dict[str, Any]:
    """Sizes that 4 ranks can share, in whole blocks of NF4: wider, each weight smaller for that. Two query heads for
    each key head where a family may have them."""
    if quantize is not None:
        heads = {"num_attention_heads": 16, **({} if "gpt" in family else {"num_key_value_heads": 4})}
        return {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1, **heads}
    if "gpt" in family:
        return {}
    has_own_head_dim = family not in ("qwen2", "phi", "phi3", "phi3-longrope")
    return {"num_key_value_heads": 4, **({"num_attention_heads": 8} if has_own_head_dim else {})}


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MORE_FAMILY_NAMES])
def test_float32_logits_of_a_mixed_batch_are_one_processs(family: str, leader: Leader, one_process: MakeOne) -> None:
    assert_ranks_equal(leader, one_process(family, None))


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MORE_FAMILY_NAMES])
def test_float32_logits_of_an_nf4_base_are_one_processs(family: str, leader: Leader, one_process: MakeOne) -> None:
    assert_ranks_equal(leader, one_process(family, "nf4"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_base_that_is_stored_in_nf4_is_shared_as_it_is(family: str, leader: Leader, one_process: MakeOne) -> None:
    one = one_process(family, "nf4")
    stored = save_in_nf4(one.base, one.base.parent / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    assert_ranks_equal(leader, replace(one, base=stored, quantize=None))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "olmo2"])
def test_a_forward_has_two_sums_for_each_layer_and_two_more_where_norms_span_all_heads(
    family: str, leader: Leader, one_process: MakeOne
) -> None:
    shared = shared_base(leader, one_process(family, None).base)
    forward = PackedForward(shared, [], num_sequences=1, leader=leader)
    before = leader.ranks.num_sums
    forward.logits([forward.request(0, prompts()[0], None)])
    expected = int(shared.config.num_hidden_layers) * (2 + SUMS_OF_NORMS.get(family, 0))
    assert leader.ranks.num_sums - before == expected


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_dora_has_its_part_of_the_factors(quantize: str | None, leader: Leader, tmp_path: Path) -> None:
    """Phi has biases, which the factors leave alone, on layers of both kinds."""
    base = save_base(tmp_path / "base", "phi", **divisible("phi", quantize))
    names = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    made = [
        LoraConfig(use_dora=dora, r=rank, target_modules=names) for dora, rank in ((True, 4), (False, 7), (True, 1))
    ]
    adapters = [save_random(base, tmp_path / str(seed), config, seed) for seed, config in enumerate(made)]
    assert_ranks_equal(leader, OneProcess.of(base, adapters, quantize))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_int8_adapter_keeps_its_bytes(quantize: str | None, leader: Leader, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", **divisible("llama", quantize))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    made = [LoraConfig(r=rank, target_modules=names) for rank in (4, 3, 16)]
    adapters = [save_adapter(base, tmp_path / str(seed), config, seed=seed) for seed, config in enumerate(made)]
    dora = save_random(base, tmp_path / "dora", LoraConfig(use_dora=True, r=5, target_modules=names), 9)
    kinds = [as_int8(adapters[0]), adapters[1], as_int8(adapters[2]), as_int8(dora)]
    assert_ranks_equal(leader, OneProcess.of(base, kinds, quantize))


@pytest.mark.parametrize(("family", "quantize"), [("llama", None), ("llama", "nf4"), ("gemma2", None)])
def test_own_embeddings_and_heads_are_whole_on_every_rank(
    family: str, quantize: str | None, leader: Leader, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, **divisible(family, quantize))
    made = [
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        LoraConfig(r=3, target_modules=["v_proj", "embed_tokens"]),
        LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["down_proj"], use_dora=True, modules_to_save=["lm_head"]),
    ]
    adapters = [save_random(base, tmp_path / str(seed), config, seed) for seed, config in enumerate(made)]
    assert_ranks_equal(leader, OneProcess.of(base, adapters, quantize))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_experts_and_routers_are_changed_by_adapters(quantize: str | None, leader: Leader, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe", **divisible("qwen3-moe", quantize))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    made = [
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=experts),
        LoraConfig(r=3, target_modules=[], target_parameters=experts[1:]),
        LoraConfig(r=5, target_modules=[], target_parameters=["gate.weight"]),
        LoraConfig(r=2, target_modules="all-linear"),
    ]
    adapters = [save_adapter(base, tmp_path / str(seed), config, seed=seed) for seed, config in enumerate(made)]
    assert_ranks_equal(leader, OneProcess.of(base, adapters, quantize))
    assert_ranks_equal(leader, OneProcess.of(base, [as_int8(adapters[0]), adapters[2]], quantize))


def test_what_cannot_be_shared_evenly_is_refused_with_the_numbers(leader: Leader, tmp_path: Path) -> None:
    for field, name in (("num_key_value_heads", "1 key-value heads"), ("intermediate_size", "97")):
        size = 1 if field == "num_key_value_heads" else 97
        base = save_base(tmp_path / field, "llama", **{"num_key_value_heads": 4, field: size})
        with pytest.raises(UnsupportedBase, match=rf"--tensor-parallel {leader.num_ranks}: .*{name}"):
            cuts_of(base, leader.num_ranks)

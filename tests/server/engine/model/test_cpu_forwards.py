"""Forwards that are replayed on a CPU give the bits of plain ones: every family and precision, prompts and decode
steps, adapters that change from step to step. Where something cannot be recorded, the plain forward runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lora_kernels.native.bindings import native_ops
from server.engine.model.base_model import load_base
from server.engine.model.batch import Batch
from server.engine.model.recorded import cpu_forwards
from server.engine.model.recorded.cpu_forwards import CpuForwards
from server.engine.request import Request, SamplingParams
from server.engine.schedule import ScheduledRow
from support.models.models import FAMILY_NAMES, MORE_FAMILY_NAMES, VOCAB, save_adapters, save_base
from support.models.packed_forward import BLOCKS_PER_ROW, PackedForward

NUM_SEQUENCES = 6


class World:
    """Sequences that grow by a step's tokens; each step is computed plainly and through `forwards`."""

    def __init__(self, folder: Path, family: str, dtype: str, quantize: str | None = None, *, adapters: bool = True):
        base = save_base(folder / "base", family)
        paths = list(save_adapters(base, folder / "adapters").values()) if adapters else []
        self.packed = PackedForward(load_base(base, dtype=dtype, quantize=quantize), paths, num_sequences=NUM_SEQUENCES)
        self.runner = self.packed.runner
        self.runner.replay_on_cpu()
        assert self.runner.cpu_forwards is not None
        self.forwards: CpuForwards = self.runner.cpu_forwards
        self.draw = random.Random(3)
        self.num_adapters = len(paths)
        self.requests = [self._request(index) for index in range(NUM_SEQUENCES)]

    def _request(self, index: int) -> Request:
        request = self.packed.request(index, [], None)
        request.params = SamplingParams(max_tokens=4)
        return request

    @property
    def caches(self) -> list[torch.Tensor]:
        return [tensor for layer in self.packed.cache.layers for tensor in (layer.keys, layer.values)]

    @torch.inference_mode()
    def step(self, counts: Sequence[int], slots: Sequence[int | None]) -> None:
        """The next counts[i] tokens of sequence i under slots[i]; several are a prompt's, one is an answer's."""
        rows = []
        for request, count, slot in zip(self.requests, counts, slots, strict=True):
            request.slot = slot
            tokens = [self.draw.randrange(3, VOCAB) for _ in range(count)]
            (request.prompt_ids if count > 1 else request.output_ids).extend(tokens)
            if count:
                rows.append(ScheduledRow(request, request.num_computed_tokens, count))
        batch = self.packed.batch(rows)
        plain = self.runner.forward(batch).clone()
        assert same_bits(self.forwards(batch), plain)
        for row in rows:
            row.request.num_computed_tokens += row.num_tokens

    def any_slots(self) -> list[int | None]:
        most = self.num_adapters
        return [self.draw.choice([None, *range(most)]) for _ in self.requests]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


PLAIN_FAMILIES = {"qwen3-moe"}  # which expert computes a row is known while the step runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MORE_FAMILY_NAMES])
def test_a_replayed_forward_has_the_bits_of_the_plain_one(family: str, dtype: str, tmp_path: Path) -> None:
    check_many_steps(World(tmp_path, family, dtype), is_replayed=family not in PLAIN_FAMILIES)


def test_on_an_nf4_base_too(tmp_path: Path) -> None:
    check_many_steps(World(tmp_path, "llama", "bfloat16", "nf4"), is_replayed=True)


def check_many_steps(world: World, *, is_replayed: bool) -> None:
    assert native_ops(torch.float32) is not None, "the C kernels are built where tests run"
    for _ in range(5):
        world.step([3] * NUM_SEQUENCES, world.any_slots())
    for _ in range(12):
        world.step([1] * NUM_SEQUENCES, world.any_slots())
        world.step([1, 1, 1, 0, 0, 0], [None] * NUM_SEQUENCES)
    world.step([1, 5, 1, 7, 1, 1], world.any_slots())
    forwards = world.forwards
    assert (forwards.failure is None) is is_replayed, forwards.failure
    assert forwards.num_replays == (
        20 if is_replayed else 0
    )  # each of two kinds runs plainly, is recorded, is compared


def test_long_prompts_are_replayed_where_the_kernels_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forwards, "MAX_TOKENS", 45)
    world = World(tmp_path, "llama", "bfloat16", adapters=False)
    world.requests[0].block_ids = list(range(NUM_SEQUENCES * BLOCKS_PER_ROW))  # the others rest
    native = native_ops(torch.bfloat16)
    assert native is not None
    for count, num_replays in ((250, 0), (45, 4), (46, 0)):
        before = world.forwards.num_replays
        for _ in range(7 if count < 50 else 1):
            world.step([count, *[0] * (NUM_SEQUENCES - 1)], [None] * NUM_SEQUENCES)
        assert world.forwards.num_replays - before == (num_replays if native.takes_prompts else 0)
    assert world.forwards.failure is None


def test_of_kinds_with_many_tokens_one_is_compared_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forwards, "FEW_TOKENS", 10)
    world = World(tmp_path, "llama", "bfloat16")
    for count, num_replays in ((2, 2), (3, 3), (1, 2)):
        before = world.forwards.num_replays
        for _ in range(5):
            world.step([count] * NUM_SEQUENCES, [0] * NUM_SEQUENCES)
        assert world.forwards.num_replays - before == num_replays


@torch.inference_mode()
def test_a_chunk_without_logits_is_replayed_and_leaves_the_same_keys_and_values(tmp_path: Path) -> None:
    world = World(tmp_path, "llama", "bfloat16", adapters=False)
    request = world.requests[0]
    request.prompt_ids = [world.draw.randrange(3, VOCAB) for _ in range(100)]
    chunks = [ScheduledRow(request, start, 10) for start in range(0, 60, 10)]
    assert all(world.forwards(world.packed.batch([chunk])).shape == (0, VOCAB) for chunk in chunks)
    assert world.forwards.num_replays == 3
    left = [cache.clone() for cache in world.caches]
    for cache in world.caches:
        cache.fill_(torch.nan)
    for chunk in chunks:
        world.runner.forward(world.packed.batch([chunk]))
    assert all(map(same_bits, left, world.caches))


def test_a_replay_that_would_differ_is_found_before_it_is_used(tmp_path: Path) -> None:
    """What a forward takes from elsewhere than its batch would be frozen in a tape."""
    world = World(tmp_path, "llama", "bfloat16", adapters=False)
    calls = 0

    def drifting(batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return world.runner.forward(batch) + calls

    forwards = CpuForwards(drifting, world.packed.base, world.caches)
    for number in range(1, 6):
        for request in world.requests:
            request.output_ids.append(5 + number)
        rows = [ScheduledRow(request, request.num_computed_tokens, 1) for request in world.requests]
        batch = world.packed.batch(rows)
        with torch.inference_mode():
            assert same_bits(forwards(batch).clone(), world.runner.forward(batch) + calls)
        for row in rows:
            row.request.num_computed_tokens += 1
    assert forwards.failure is not None
    assert "other logits" in forwards.failure
    assert forwards.num_replays == 0


def test_kinds_that_do_not_come_again_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forwards, "MAX_KINDS", 3)
    world = World(tmp_path, "llama", "bfloat16", adapters=False)
    for _ in range(3):
        for rows in range(1, NUM_SEQUENCES + 1):
            world.step([1] * rows + [0] * (NUM_SEQUENCES - rows), [None] * NUM_SEQUENCES)
    assert world.forwards.num_replays == 0
    for _ in range(4):
        world.step([1] * NUM_SEQUENCES, [None] * NUM_SEQUENCES)
    assert world.forwards.num_replays == 2
    assert len(world.forwards._recordings) == 3

"""Recorded decode steps give the logits and tokens of plain ones: real kernels, real model, real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from lora_kernels.triton_common.available import triton_switch
from server.engine.model.base_model import load_base
from server.engine.model.recorded.cuda_graphs import DecodeGraphs, GraphSettings
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from server.engine.request import Request
from server.engine.schedule import ScheduledRow, SchedulerSettings
from support.kernels.eager_capture import EagerCapture
from support.models.models import VOCAB, save_adapters, save_base
from support.models.packed_forward import BLOCK_SIZE, BLOCKS_PER_ROW, PackedForward
from support.models.random_peft import as_int8
from support.models.random_peft import save as save_random
from support.servers.service import make_base, running
from support.servers.service import save_adapters as service_adapters

MAX_CONTEXT = BLOCK_SIZE * BLOCKS_PER_ROW
CONTEXTS = (1, 9, 30, 17)
SUBSET = 3  # the slot of the adapter that touches one module
INT8, DORA = 6, 7
EXPERTS = "experts.down_proj"


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    triton_switch().on_cpu = True
    yield
    triton_switch().on_cpu = False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PackedForward:
    """A base whose every second layer has a window, six adapters of ranks 1 to 16, one in int8, one with DoRA, a cache
    full of NaN."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "llama", num_hidden_layers=2)
    adapters = list(save_adapters(base, folder / "adapters").values())
    for name in ("int8", "dora"):
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=name == "dora")
        adapters.append(save_random(base, folder / name, config, 1))
    as_int8(folder / "int8")
    return PackedForward(load_base(base, dtype="float32"), adapters, num_sequences=8)


def graphs_over(world: PackedForward, settings: GraphSettings, *, tokens_per_tile: int = 1) -> DecodeGraphs:
    runner = ModelRunner(world.base, world.cache, world.table, sampler=None)  # type: ignore[arg-type]
    buffers = DecodeBuffers(
        world.table,
        max_rows=settings.buckets[-1],
        max_context=MAX_CONTEXT,
        block_size=BLOCK_SIZE,
        tokens_per_tile=tokens_per_tile,
    )
    graphs = DecodeGraphs(buffers, runner.forward, EagerCapture(), settings)
    graphs.record_all()
    return graphs


def unread(world: PackedForward, index: int, length: int, slot: int | None) -> Request:
    generator = torch.Generator().manual_seed(index)
    return world.request(index, torch.randint(3, VOCAB, (length,), generator=generator).tolist(), slot)


def prefilled(world: PackedForward, index: int, slot: int | None) -> Request:
    """All but the last token of a random prompt is in the cache."""
    request = unread(world, index, CONTEXTS[index], slot)
    if request.num_tokens > 1:
        world.logits([request], [request.num_tokens - 1])
    return request


@pytest.mark.parametrize("slots", [(None, None, None, None), (5, None, 4, 5)], ids=str)
def test_logits_of_a_recorded_step_equal_those_of_a_plain_one(
    world: PackedForward, slots: tuple[int | None, ...]
) -> None:
    graphs = graphs_over(world, GraphSettings(buckets=(2, 5), max_ranks=(0, 16)))
    requests = [prefilled(world, index, slot) for index, slot in enumerate(slots)]
    rows = [ScheduledRow(request, request.num_computed_tokens, 1) for request in requests]
    for chosen in (rows, rows[1:3]):
        got = graphs.run(chosen).clone()
        for row, logits in zip(chosen, got, strict=True):
            row.request.num_computed_tokens = row.start
            exact = world.logits([row.request])[0][-1]
            assert (logits - exact).abs().max() <= 2e-5


def test_logits_of_a_recorded_step_with_prompts_equal_those_of_a_plain_one(world: PackedForward) -> None:
    """A whole prompt, a part of one, one whose adapter becomes active inside, beside rows that decode."""
    settings = GraphSettings(buckets=(26,), max_ranks=(16,), max_prompt_keys=10_000)
    graphs = graphs_over(world, settings, tokens_per_tile=8)
    decodes = [prefilled(world, index, slot) for index, slot in ((1, 5), (0, None))]
    prompts = [unread(world, index, length, slot) for index, length, slot in ((2, 13, 4), (3, 9, 5), (4, 6, 1))]
    prompts[2].active_from = 4
    world.logits([prompts[1]], [3])
    requests, counts = [*decodes, *prompts], [1, 1, 13, 4, 6]
    rows = [
        ScheduledRow(request, request.num_computed_tokens, count)
        for request, count in zip(requests, counts, strict=True)
    ]
    got = graphs.run(rows).clone()
    exact = torch.cat(world.logits(requests, counts))
    assert (got - exact).abs().max() <= 2e-5


def test_a_base_with_experts_replays_adapters_on_routers_and_launches_those_on_experts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    configs = [
        LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[name]) for name in ("gate.weight", EXPERTS)
    ]
    folders = [save_random(base, tmp_path / str(seed), config, seed) for seed, config in enumerate(configs)]
    world = PackedForward(load_base(base, dtype="float32"), folders, num_sequences=8)
    graphs = graphs_over(world, GraphSettings(buckets=(4,), max_ranks=(0, 16)))
    requests = [prefilled(world, index, slot) for index, slot in enumerate((0, None, 1, 0))]
    rows = [ScheduledRow(request, request.num_computed_tokens, 1) for request in requests]
    assert not graphs.has_room(rows)
    recorded = [rows[0], rows[1], rows[3]]
    assert graphs.has_room(recorded)
    got = graphs.run(recorded).clone()
    for row, logits in zip(recorded, got, strict=True):
        row.request.num_computed_tokens = row.start
        assert (logits - world.logits([row.request])[0][-1]).abs().max() <= 2e-5


def test_a_recorded_step_with_int8_and_dora_has_the_logits_of_the_cpu(world: PackedForward) -> None:
    graphs = graphs_over(world, GraphSettings(buckets=(4,), max_ranks=(16,), with_special=True))
    triton_switch().on_cpu = False
    rows = [
        ScheduledRow(request, request.num_computed_tokens, 1)
        for request in (prefilled(world, index, slot) for index, slot in enumerate((INT8, None, 5, DORA)))
    ]
    triton_switch().on_cpu = True
    got = graphs.run(rows).clone()
    triton_switch().on_cpu = False
    for row in rows:
        row.request.num_computed_tokens = row.start
    exact = torch.cat(world.logits([row.request for row in rows]))
    assert (got - exact).abs().max() <= 5e-5
    assert [graphs._form_of(chosen).special for chosen in (rows, rows[1:3])] == [True, False]


def test_a_recording_for_few_modules_gives_the_logits_of_a_plain_step(world: PackedForward) -> None:
    """Where the others do not launch. Both recordings are of rank 16; the narrow one is taken where it suffices."""
    slots = (SUBSET, None, SUBSET)
    touched = frozenset(np.flatnonzero(world.table.touched[:, SUBSET]).tolist())
    assert 0 < len(touched) < len(world.table.ranks)
    settings = GraphSettings(buckets=(3,), max_ranks=(0, 16), module_sets=(touched,))
    graphs = graphs_over(world, settings)
    rows = [
        ScheduledRow(request, request.num_computed_tokens, 1)
        for request in (prefilled(world, index, slot) for index, slot in enumerate(slots))
    ]
    got = graphs.run(rows).clone()
    assert graphs._form_of(rows).modules == touched
    for row, logits in zip(rows, got, strict=True):
        row.request.num_computed_tokens = row.start
        assert (logits - world.logits([row.request])[0][-1]).abs().max() <= 2e-5


def test_padding_rows_write_no_key_and_no_value(world: PackedForward) -> None:
    graphs = graphs_over(world, GraphSettings(buckets=(4,), max_ranks=(16,)))
    request = prefilled(world, 2, 1)
    for layer in world.cache.layers:
        layer.keys[: 2 * BLOCKS_PER_ROW] = torch.nan
        layer.keys[3 * BLOCKS_PER_ROW :] = torch.nan
    graphs.run([ScheduledRow(request, request.num_computed_tokens, 1)])
    for layer in world.cache.layers:
        assert layer.keys[: 2 * BLOCKS_PER_ROW].isnan().all()
        assert layer.keys[3 * BLOCKS_PER_ROW :].isnan().all()
        assert layer.keys[2 * BLOCKS_PER_ROW].isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        GraphSettings(buckets=(4,), max_ranks=(0, 16)),
        GraphSettings(buckets=(4, 16), max_ranks=(0, 16), max_prompt_keys=1000),
    ],
    ids=["decodes", "and prompts"],
)
def test_an_engine_with_recordings_gives_the_same_tokens(tmp_path: Path, settings: GraphSettings) -> None:
    """Requests join and leave, so that the rows and adapters of a step change under one recording."""
    base = make_base(tmp_path / "base", num_hidden_layers=2)
    adapters = service_adapters(base, tmp_path / "adapters")
    prompts = [[10, 11, 12, 13], [50, 51], [7] * 9, [99, 3, 5]]
    kinds = [None, *list(adapters)[:3]]
    lengths = [6, 3, 5, 2]
    with running(base, adapters, tmp_path / "data", scheduler=SchedulerSettings(prompt_lookup=0)) as service:
        triton_switch().on_cpu = False
        expected = [
            service.tokens(prompt, kind, max_tokens=length)
            for prompt, kind, length in zip(prompts, kinds, lengths, strict=True)
        ]
        triton_switch().on_cpu = True
        runner = service.parts.engine._runner
        assert isinstance(runner, ModelRunner)
        block_size = runner.cache.block_size
        buffers = DecodeBuffers(
            runner.table, max_rows=settings.buckets[-1], max_context=64, block_size=block_size, tokens_per_tile=8
        )
        capture = EagerCapture()
        runner.graphs = DecodeGraphs(buffers, runner.forward, capture, settings)
        runner.graphs.record_all()
        asked = [
            service.ask(prompt, kind, max_tokens=length)[1]
            for prompt, kind, length in zip(prompts, kinds, lengths, strict=True)
        ]
        assert [answer.tokens() for answer in asked] == expected
    assert capture.num_replays >= 4

"""Which steps a recording serves, in which order they are recorded, and what each replay reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adapters_store.base.description import AdapterDigest
from lora_kernels.lora.batch import LoraGroup, LoraTable
from server.engine.model.batch import Batch
from server.engine.model.recorded.cuda_graphs import DecodeGraphs, GraphSettings, why_no_graphs
from server.engine.model.recorded.decode_buffers import DecodeBuffers, DeviceTokens
from server.engine.request import Request, SamplingParams
from server.engine.schedule import Schedule, ScheduledRow
from support.kernels.eager_capture import EagerCapture
from support.models.models import FAMILY_CONFIGS

PAGE, MAX_CONTEXT = 4, 40
SETTINGS = GraphSettings(buckets=(1, 2, 4), max_ranks=(0, 16, 256))


def table_with(ranks: list[int]) -> LoraTable:
    table = LoraTable(torch.zeros(4096), 2, len(ranks))
    for slot, rank in enumerate(ranks):
        table.set_slot(slot, 0, [(0, 0, 64, rank, 1.0)])
    return table


def row(name: str, tokens: list[int], blocks: list[int], *, slot: int | None = None, **params: Any) -> ScheduledRow:
    """A request whose last token is to be computed."""
    request = Request(name, "t", tokens[:-1], SamplingParams(**params), output_ids=tokens[-1:], block_ids=blocks)
    if slot is not None:
        request.slot, request.adapter = slot, AdapterDigest(f"d{slot}")
    return ScheduledRow(request, len(tokens) - 1, 1)


def schedule(*rows: ScheduledRow) -> Schedule:
    return Schedule(list(rows), sum(each.num_tokens for each in rows), len(rows))


class World:
    """Graphs over a forward that writes down what it read."""

    def __init__(self, ranks: list[int], settings: GraphSettings = SETTINGS, *, tokens_per_tile: int = 1) -> None:
        self.seen: list[dict[str, Any]] = []
        self.recorded: list[tuple[int, int]] = []
        self.table = table_with(ranks)
        rows = settings.buckets[-1]
        self.buffers = DecodeBuffers(
            self.table, max_rows=rows, max_context=MAX_CONTEXT, block_size=PAGE, tokens_per_tile=tokens_per_tile
        )
        self.graphs = DecodeGraphs(self.buffers, self.forward, EagerCapture(), settings)
        self.graphs.record_all()
        self.recorded, self.seen = [(each["rows"], each["max_rank"]) for each in self.seen], []

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits whose row r is r's token id."""
        tiles = batch.paged.attention_tiles(1, 16, 128, torch.device("cpu"))
        adapters = batch.layer_adapters
        self.seen.append(
            {
                "rows": batch.input_ids_1T.shape[1],
                "max_rank": 0 if adapters is None else adapters.row_tiles.max_rank,
                "ids": batch.input_ids_1T[0].tolist(),
                "positions": batch.position_ids_1T[0].tolist(),
                "slots": batch.paged.slot_mapping_T.tolist(),
                "records": tiles.decode.records.tolist(),
                "tables": tiles.block_tables.tolist(),
                "lora": None if adapters is None else adapters.row_tiles.records.tolist(),
                "lora_rows": None if adapters is None else adapters.row_tiles.rows.tolist(),
                "places": (batch.input_ids_1T.data_ptr(), tiles.block_tables.data_ptr()),
            }
        )
        return batch.input_ids_1T[0].float()[:, None].expand(-1, 3).clone()

    def run(self, *rows: ScheduledRow) -> tuple[torch.Tensor, dict[str, Any]]:
        logits = self.graphs.run(rows)
        return logits, self.seen[-1]


def test_the_largest_is_recorded_first_and_every_rank_of_it() -> None:
    assert World([4]).recorded == [(rows, rank) for rows in (4, 2, 1) for rank in (256, 16, 0)]


def test_a_step_reads_its_own_rows_and_harmless_padding() -> None:
    first = row("a", [7, 8, 9, 10, 11], [5, 6], slot=1)
    second = row("b", [20], [2])
    third = row("c", [31, 32], [9], slot=0)
    logits, seen = World([4, 3]).run(first, second, third)
    assert logits[:, 0].tolist() == [11, 20, 32]
    assert (seen["rows"], seen["max_rank"]) == (4, 16)
    assert seen["ids"] == [11, 20, 32, 0]
    assert seen["positions"] == [4, 0, 1, 0]
    assert seen["slots"] == [6 * PAGE, 2 * PAGE, 9 * PAGE + 1, -1]
    assert seen["records"] == [[0, 0, 1, 4], [2, 1, 1, 0], [3, 2, 1, 1], [0, 0, 0, 0]]
    assert seen["tables"][:4] == [5, 6, 2, 9]
    assert seen["lora"] == [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert seen["lora_rows"][:2] == [2, 0]


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_the_smallest_recording_with_room_is_taken(count: int, bucket: int) -> None:
    rows = [row(str(index), [index + 1], [index]) for index in range(count)]
    logits, seen = World([4]).run(*rows)
    assert (seen["rows"], len(logits)) == (bucket, count)


@pytest.mark.parametrize(("ranks", "recorded"), [([], 0), ([1], 16), ([16, 3], 16), ([3, 17], 256), ([256], 256)])
def test_the_largest_rank_of_the_step_chooses_the_recording(ranks: list[int], recorded: int) -> None:
    rows = [row("base", [1], [0]), *(row(str(slot), [1], [slot + 1], slot=slot) for slot in range(len(ranks)))]
    _, seen = World([*ranks, 4]).run(*rows)
    assert seen["max_rank"] == recorded


QKV, ATTENTION = frozenset({0, 1}), frozenset({0, 1, 2})
NARROW = GraphSettings(buckets=(2,), max_ranks=(0, 16, 256), module_sets=(QKV, ATTENTION))


@pytest.mark.parametrize(
    ("modules", "rank", "launched"),
    [
        ([[]], 0, None),
        ([[0]], 4, QKV),
        ([[0], [1]], 4, QKV),
        ([[0], [2]], 16, ATTENTION),
        ([[3]], 4, {0, 1, 2, 3}),
        ([[0], [0, 1, 2, 3]], 4, {0, 1, 2, 3}),
        ([[0]], 17, {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_a_step_launches_no_group_that_its_kind_of_adapters_leaves_out(
    modules: list[list[int]], rank: int, launched: set[int] | None
) -> None:
    """modules: of the adapter of each row. Another resident adapter touches all, and is in no row."""
    table = LoraTable(torch.zeros(4096), 4, 3)
    for slot, touched in enumerate([*modules, [0, 1, 2, 3]]):
        table.set_slot(slot, 0, [(module, 0, 64, rank, 1.0) for module in touched])
    seen: list[set[int] | None] = []

    def forward(batch: Batch) -> torch.Tensor:
        adapters = batch.layer_adapters
        seen.append(None if adapters is None else set(np.flatnonzero(adapters.touched_modules).tolist()))
        return torch.zeros(batch.input_ids_1T.shape[1], 3)

    buffers = DecodeBuffers(table, max_rows=2, max_context=MAX_CONTEXT, block_size=PAGE)
    graphs = DecodeGraphs(buffers, forward, EagerCapture(), NARROW)
    graphs.record_all()
    assert graphs.num_recorded == NARROW.num_recordings == 5
    graphs.run([row(str(slot), [1], [slot], slot=slot) for slot in range(len(modules))])
    assert seen[-1] == launched


@pytest.mark.parametrize("with_special", [False, True])
def test_a_step_with_dora_or_int8_is_replayed_by_a_recording_for_them_or_launched_plainly(with_special: bool) -> None:
    table, large = LoraTable(torch.zeros(4096), 2, 4), 3
    for slot in range(4):
        factors = [(0, 640)] if slot == 1 else []
        table.set_slot(slot, 0, [(0, 0, 64, 20 if slot == large else 4, 1.0)], factors=factors, is_int8=slot == 2)
    seen: list[tuple[bool, int]] = []

    def forward(batch: Batch) -> torch.Tensor:
        adapters = batch.layer_adapters
        if adapters is not None:
            seen.append((adapters.is_special(LoraGroup((0,), 16, (16,))), adapters.row_tiles.max_rank))
        return torch.zeros(batch.input_ids_1T.shape[1], 3)

    settings = replace(SETTINGS, with_special=with_special)
    graphs = DecodeGraphs(
        DecodeBuffers(table, max_rows=4, max_context=9, block_size=4), forward, EagerCapture(), settings
    )
    graphs.record_all()
    assert graphs.num_recorded == settings.num_recordings == 3 * (5 if with_special else 3)
    plain, *special = (
        [row(str(slot), [1], [slot], slot=slot) for slot in slots] for slots in ([0], [0, 1], [2], [2, large])
    )
    graphs.run(plain)
    assert seen[-1] == (False, 16)
    assert graphs.has_room(plain)
    for rows, rank in zip(special, (16, 16, 256), strict=True):
        assert graphs.has_room(rows) is with_special
        if with_special:
            graphs.run(rows)
            assert seen[-1] == (True, rank)


MIXED = GraphSettings(buckets=(2, 8), max_ranks=(0, 16, 256), max_prompt_keys=70)


def chunk(name: str, prompt: list[int], first: int, count: int, blocks: list[int], **params: Any) -> ScheduledRow:
    return ScheduledRow(Request(name, "t", prompt, SamplingParams(**params), block_ids=blocks), first, count)


def test_a_prompt_is_as_many_rows_of_a_recording_as_it_has_tokens() -> None:
    """Two of its tokens share a tile of attention here; those before the adapter is active have none."""
    world = World([4, 3], MIXED, tokens_per_tile=2)
    whole = chunk("p", [31, 32, 33, 34, 35], 2, 3, [9, 6])
    whole.request.slot, whole.request.active_from = 1, 3
    middle = chunk("m", [1, 2, 3, 4], 1, 2, [3])
    decode = row("a", [7, 8], [5], slot=0)
    logits, seen = world.run(decode, whole, middle)
    assert logits[:, 0].tolist() == [8, 33, 34, 35, 2, 3]
    assert seen["ids"] == [8, 33, 34, 35, 2, 3, 0, 0]
    assert seen["positions"] == [1, 2, 3, 4, 1, 2, 0, 0]
    places = [5 * PAGE + 1, 9 * PAGE + 2, 9 * PAGE + 3, 6 * PAGE, 3 * PAGE + 1, 3 * PAGE + 2]
    assert seen["slots"] == [*places, -1, -1]
    assert seen["records"] == [[0, 0, 1, 1], [1, 1, 2, 2], [1, 3, 1, 4], [3, 4, 2, 1], *[[0] * 4] * 4]
    assert seen["lora"] == [[0, 0, 1], [1, 1, 2], *[[0] * 3] * 6]
    assert seen["lora_rows"][:3] == [0, 2, 3]
    _, seen = world.run(decode, chunk("q", [5, 6, 7], 0, 3, [1]))
    assert seen["records"] == [[0, 0, 1, 1], [1, 1, 2, 0], [1, 3, 1, 2], *[[0] * 4] * 5]
    assert seen["slots"][4:] == [-1] * 4


@pytest.mark.parametrize(
    ("rows", "takes"),
    [
        ([chunk("p", [1] * 7, 0, 7, [0, 1])], True),
        ([chunk("p", [1] * 9, 0, 3, [0, 1, 2]), row("a", [1], [3])], True),
        ([chunk("p", [1] * 9, 0, 3, [0, 1, 2])], False),
        ([chunk("p", [1] * 8, 0, 8, [0, 1]), row("a", [1], [3])], False),
        ([chunk("p", [1] * 32, 26, 6, list(range(8)))], False),
        ([chunk("p", [1] * 4, 0, 4, [0], prompt_logprobs=1)], False),
        ([chunk("p", [1] * 4, 0, 4, [0], max_tokens=0, pooling="mean"), row("a", [1], [3])], False),
    ],
    ids=["whole", "part beside a decode", "no token", "too many", "too many keys", "prompt logprobs", "pooled"],
)
def test_a_step_with_a_short_prompt_is_replayed_unless_more_is_wanted_of_it(
    rows: list[ScheduledRow], takes: bool
) -> None:
    assert World([4], MIXED).graphs.takes(schedule(*rows)) is takes
    assert not World([4], replace(MIXED, max_prompt_keys=0)).graphs.takes(schedule(*rows))


def test_nothing_of_a_larger_step_is_left_in_a_smaller_one() -> None:
    world = World([4, 4, 4, 4])
    world.run(*(row(str(index), [index + 5], [index + 10], slot=index) for index in range(4)))
    _, seen = world.run(row("x", [9], [1]), row("y", [8], [2]), row("z", [7], [3], slot=2))
    assert seen["ids"] == [9, 8, 7, 0]
    assert seen["slots"] == [4, 8, 12, -1]
    assert seen["records"][3] == [0, 0, 0, 0]
    assert seen["lora"] == [[2, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_every_step_reads_the_same_memory() -> None:
    world = World([4])
    places = {world.run(row("a", [1, 2], [3]))[1]["places"] for _ in range(3)}
    assert len(places) == 1


def test_a_block_table_that_grows_is_extended_and_a_new_one_is_read_again() -> None:
    """A preempted request comes back with other blocks: answering from the old ones would be another tenant's text."""
    world = World([4])
    growing = row("a", [1, 2, 3, 4], [5])
    assert world.run(growing)[1]["tables"][0] == 5
    growing.request.block_ids += [6]
    growing.request.output_ids.append(9)
    growing.start = 4
    _, seen = world.run(growing)
    assert (seen["tables"][:2], seen["slots"]) == ([5, 6], [6 * PAGE])
    growing.request.block_ids = [7, 8]
    assert world.run(growing)[1]["tables"][:2] == [7, 8]
    world.graphs.forget("a")
    growing.request.block_ids = [3, 4]
    assert world.run(growing)[1]["tables"][:2] == [3, 4]


def mid_prompt() -> ScheduledRow:
    request = Request("p", "t", [1, 2, 3], SamplingParams(), block_ids=[0])
    return ScheduledRow(request, 1, 1)


def unaligned(world: World) -> None:
    world.table.set_slot(0, 1, [(0, 0, 64, 4, 1.0)])


@pytest.mark.parametrize(
    ("rows", "spoil"),
    [
        ([row(str(index), [1], [index]) for index in range(5)], None),
        ([row("a", [1], [0]), ScheduledRow(row("b", [1, 2], [1]).request, 0, 2)], None),
        ([mid_prompt()], None),
        ([row("a", [1, 2], [0], prompt_logprobs=1)], lambda world: None),
        ([row("a", [1], list(range(11)))], None),
        ([row("a", [1], [0])], unaligned),
    ],
    ids=["too many", "a prompt chunk", "inside a prompt", "prompt logprobs", "too long", "unaligned adapter"],
)
def test_a_step_without_a_recording_is_launched_plainly(
    rows: list[ScheduledRow], spoil: Callable[[World], None] | None
) -> None:
    world = World([4])
    if rows[0].request.params.prompt_logprobs is not None:
        rows[0].request.prompt_ids.append(rows[0].request.output_ids.pop())
    elif spoil is None and len(rows) == 1:
        assert world.graphs.takes(schedule(row("plain", [1], [0])))
    if spoil is not None:
        spoil(world)
    assert not world.graphs.takes(schedule(*rows))


def test_all_recordings_write_their_logits_into_one_tensor() -> None:
    """One for each would take 3.25 GB for 105 recordings of up to 256 rows and a vocabulary of 128 k."""
    world = World([4])
    few, many = (world.run(*(row(str(index), [index], [index]) for index in range(count)))[0] for count in (1, 3))
    assert few.data_ptr() == many.data_ptr()
    assert many.untyped_storage().nbytes() == SETTINGS.buckets[-1] * many.shape[1] * many.itemsize


def test_a_rank_beyond_the_recorded_ones_is_launched_plainly() -> None:
    world = World([64], GraphSettings(buckets=(2,), max_ranks=(0, 16)))
    assert not world.graphs.takes(schedule(row("a", [1], [0], slot=0)))
    assert world.graphs.takes(schedule(row("a", [1], [0])))


def test_after_a_failed_recording_all_steps_are_launched_plainly(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(EagerCapture):
        def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            if run().shape[0] == 2:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return super().record(run)

    world = World([4])
    graphs = DecodeGraphs(world.buffers, world.forward, Failing(), SETTINGS)
    graphs.record_all()
    assert graphs.num_recorded == 0
    assert graphs.failure == "2 rows of rank 256: operation not permitted when stream is capturing"
    assert "no CUDA graphs" in caplog.text
    assert not graphs.takes(schedule(row("a", [1], [0])))


def test_buckets_are_dense_below_eight_and_end_with_the_most_rows() -> None:
    assert GraphSettings.for_rows(20, max_rank=64).buckets == (1, 2, 4, 8, 16, 20)
    assert GraphSettings.for_rows(3, max_rank=8) == GraphSettings(buckets=(1, 2, 3), max_ranks=(0, 8))
    assert GraphSettings.for_rows(64, max_rank=256).buckets[-3:] == (48, 56, 64)
    assert GraphSettings.for_rows(256, max_rank=256).buckets[10:] == (64, 80, 96, 112, 128, 160, 192, 224, 256)
    assert GraphSettings.for_rows(5000, max_rank=256).buckets[-2:] == (992, 5000)
    with_prompts = (GraphSettings.for_rows(rows, max_rank=256, max_tokens=400).buckets[-3:] for rows in (64, 256, 512))
    assert list(with_prompts) == [(256, 320, 384), (256, 320, 384), (448, 480, 512)]


def test_the_reason_against_recording_is_named() -> None:
    config = FAMILY_CONFIGS["llama"]()
    assert why_no_graphs(config, torch.device("cpu")) == "no GPU"
    assert why_no_graphs(config, torch.device("cuda")) is None
    config.rope_parameters = {"rope_type": "longrope"}
    assert why_no_graphs(config, torch.device("cuda")) == "rope_type longrope waits for the device"


def test_block_tables_that_are_known_are_not_read_again() -> None:
    """64 rows over 128 blocks each: what a step costs once they are known, against what it costs to read them."""
    buffers = DecodeBuffers(table_with([4]), max_rows=64, max_context=128 * PAGE, block_size=PAGE)
    blocks = np.arange(64 * 128).reshape(64, 128).tolist()
    rows = [row(str(index), [1], own, slot=0) for index, own in enumerate(blocks)]

    def unknown() -> None:
        for each in rows:
            buffers.forget(each.request.id)
        buffers.fill(rows, 64)

    first_s = min(_timed(unknown) for _ in range(20))
    assert min(_timed(lambda: buffers.fill(rows, 64)) for _ in range(20)) < 0.6 * first_s


def _timed(call: Callable[[], None]) -> float:
    began_s = time.thread_time()
    call()
    return time.thread_time() - began_s


def test_tokens_that_only_the_device_knows_are_gathered_row_by_row() -> None:
    """Rows of the step before may have ended or changed places; 0 replaces a missing token."""
    world = World([4])
    rows = [row(str(index), [1, 2], [index], slot=0) for index in range(3)]
    for each in rows:
        each.start += 1
    drawn = torch.tensor([70, -1, 72, 73, -2])
    logits = world.graphs.run(rows, DeviceTokens(drawn, [3, 0, 4]))
    assert world.seen[-1]["ids"] == [73, 70, 0, 0]
    assert world.seen[-1]["positions"] == [2, 2, 2, 0]
    assert logits[:, 0].tolist() == [73, 70, 0]


def test_the_host_array_is_not_written_while_a_copy_still_reads_it() -> None:
    world = World([4])
    world.run(row("a", [7], [3]))

    class Copy:
        """The last copy to the device, not done until it is waited for."""

        was_waited_for = False

        def synchronize(self) -> None:
            assert int(world.buffers._host_parts["ids"][0]) == 7, "written before"
            self.was_waited_for = True

    copy = Copy()
    world.buffers._copied = copy  # type: ignore[assignment]
    world.run(row("b", [9], [4]))
    assert copy.was_waited_for
    assert world.seen[-1]["ids"] == [9]

"""Every example in one place, the same step on any number of ranks, a packed forward that equals single ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from support.models.models import VOCAB, save_base
from support.trainers.training_data import some_examples
from trainer.data.packing import Batches, BatchSettings, InOrder, filler, forwards, pack
from trainer.data.types import IGNORED, DataCursor, PackedBatch

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=40)


def all_first_ids(batches: Iterable[PackedBatch]) -> list[int]:
    return [number for batch in batches for number in first_ids(batch)]


def first_ids(batch: PackedBatch) -> list[int]:
    """The tokens at which examples begin, which tell examples apart."""
    return batch.input_ids[0][batch.position_ids[0] == 0].tolist() if batch.num_examples else []


@settings(max_examples=200)
@given(lengths=LENGTHS, capacity=st.integers(0, 100), ranks=st.integers(1, 5))
def test_forwards_hold_every_example_once_within_capacity_and_evenly_many_per_rank(
    lengths: list[int], capacity: int, ranks: int
) -> None:
    bins = forwards(lengths, capacity=capacity, multiple_of=ranks)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert len(bins) % ranks == 0
    assert all(sum(lengths[index] for index in bin_) <= capacity or len(bin_) == 1 for bin_ in bins if bin_)
    lower = -(-max(1, -(-sum(lengths) // max(capacity, 1))) // ranks) * ranks
    assert len(bins) <= max(lower * 2 + ranks, -(-len(lengths) // ranks) * ranks)


@settings(max_examples=100)
@given(lengths=LENGTHS, ranks=st.integers(1, 4), by_tokens=st.booleans(), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_example_once_over_all_ranks_and_steps(
    lengths: list[int], ranks: int, by_tokens: bool, epoch: int
) -> None:
    examples = some_examples(lengths)
    seen: list[int] = []
    counts = set()
    for rank in range(ranks):
        batches = Batches(
            examples,
            BatchSettings(
                examples_per_step=7,
                tokens_per_step=60 if by_tokens else None,
                micro_batch_tokens=50,
                rank=rank,
                world_size=ranks,
            ),
        )
        steps = [batches.at(DataCursor(epoch, index)) for index in range(len(batches.epoch_steps(epoch)))]
        counts.add(tuple(len(step.micro_batches) for step in steps))
        seen += [number for step in steps for batch in step.micro_batches for number in first_ids(batch)]
    assert len(counts) == 1, "a rank would wait for another for ever"
    assert sorted(seen) == sorted(int(item.input_ids[0]) for item in examples)


@settings(max_examples=60)
@given(lengths=LENGTHS, micro=st.integers(40, 200), ranks=st.integers(1, 4))
def test_what_a_step_learns_depends_on_neither_forwards_nor_ranks(lengths: list[int], micro: int, ranks: int) -> None:
    examples = some_examples(lengths)
    alone = Batches(examples, BatchSettings(examples_per_step=5, seed=9))
    shared = [
        Batches(
            examples,
            BatchSettings(examples_per_step=5, seed=9, micro_batch_tokens=micro, rank=rank, world_size=ranks),
        )
        for rank in range(ranks)
    ]
    for index in range(len(alone.epoch_steps(1))):
        cursor = DataCursor(1, index)
        expected, got = alone.at(cursor), [batches.at(cursor) for batches in shared]
        ids = [batch for step in got for batch in step.micro_batches]
        assert sorted(all_first_ids(ids)) == sorted(all_first_ids(expected.micro_batches))
        assert sum(batch.weight for batch in ids) == pytest.approx(expected.weight)
        assert {step.weight for step in got} == {expected.weight}


def test_a_run_resumed_at_a_cursor_sees_what_it_would_have_seen() -> None:
    examples = some_examples([5] * 23)
    batches = Batches(examples, BatchSettings(examples_per_step=4))
    cursor, cursors = DataCursor(), []
    for _ in range(batches.num_steps(3)):
        cursors.append(cursor)
        cursor = batches.after(cursor)
    assert cursor == DataCursor(3, 0)
    assert len(set(cursors)) == 18
    late = Batches(examples, BatchSettings(examples_per_step=4))
    for seen in cursors[7:]:
        again = DataCursor(seen.epoch, seen.step)
        for one, other in zip(batches.at(seen).micro_batches, late.at(again).micro_batches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)


def test_epochs_are_shuffled_differently_and_steps_by_tokens_keep_their_budget() -> None:
    batches = Batches(some_examples([7, 9, 11, 13] * 10), BatchSettings(tokens_per_step=64))
    orders = [[index for step in batches.epoch_steps(epoch) for index in step] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    steps = [batches.at(DataCursor(0, index)) for index in range(len(batches.epoch_steps(0)))]
    assert max(step.num_tokens for step in steps) <= 64
    assert min(step.num_tokens for step in steps[:-1]) > 64 - 13
    assert batches.num_steps(2) == len(batches.epoch_steps(0)) + len(batches.epoch_steps(1))


def test_without_packing_every_forward_is_one_example() -> None:
    batches = Batches(some_examples([5, 6, 7, 8, 9]), BatchSettings(examples_per_step=5, packing=False))
    assert [batch.num_examples for batch in batches.at(DataCursor()).micro_batches] == [1] * 5


def test_settings_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="longest example \\(60 tokens\\)"):
        Batches(some_examples([60]), BatchSettings(micro_batch_tokens=50))
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\)"):
        BatchSettings(rank=2, world_size=2)
    with pytest.raises(ValueError, match="no examples"):
        Batches([], BatchSettings())


def test_labels_never_cross_examples_and_filler_teaches_nothing() -> None:
    batch = pack(some_examples([4, 3]))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert (batch.labels[0] == IGNORED).tolist() == [True, False, False, False, True, False, False]
    assert (batch.weight, int(batch.weights.count_nonzero()), batch.num_tokens) == (5.0, 5, 7)
    assert filler().weight == 0
    assert bool((filler().labels == IGNORED).all())


def test_evaluation_packs_in_order_and_loses_none() -> None:
    examples = some_examples([10, 20, 30, 40, 50])
    batches = list(InOrder(examples, micro_batch_tokens=60))
    assert [batch.num_examples for batch in batches] == [3, 1, 1]
    assert all_first_ids(batches) == [int(item.input_ids[0]) for item in examples]


def test_a_packed_forward_equals_each_example_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    examples = some_examples([17, 5, 33, 2], vocab=VOCAB)
    with torch.inference_mode():
        packed = pack(examples)
        got = model(packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
        pieces = got.split([len(item) for item in examples])
        for item, piece in zip(examples, pieces, strict=True):
            alone = model(torch.from_numpy(item.input_ids).long()[None], use_cache=False).logits[0]
            assert (piece - alone).abs().max() <= 1e-5

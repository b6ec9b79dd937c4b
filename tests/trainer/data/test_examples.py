"""Examples kept in flat arrays come back as they were, and take little more than their file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from support.trainers.training_data import demo_tokenizer, example, tenant_file, write_jsonl
from trainer.data.dataset import prepare
from trainer.data.examples import Examples, lengths_of
from trainer.data.types import EncodedExample
from trainer.spec import BatchSpec, TrainSpec

SHARES = (0.0, 1.0, 0.5, float(np.float32(0.1)))
KINDS = ("", "chat", "completion", "text")


@st.composite
def examples(draw: st.DrawFn) -> EncodedExample:
    weights = draw(st.lists(st.sampled_from(SHARES), min_size=1, max_size=12))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(weights), max_size=len(weights)))
    digest, line, kind = (
        draw(st.binary(min_size=16, max_size=16)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(KINDS)),
    )
    return EncodedExample(np.array(ids, np.int32), np.array(weights, np.float32), digest, line, kind)


def facts(item: EncodedExample) -> tuple[object, ...]:
    ids, weights = item.input_ids, item.weights
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    return ids.tolist(), weights.tolist(), item.digest, item.line, item.kind


@given(st.lists(examples(), max_size=8), st.lists(examples(), max_size=4), st.data())
def test_every_example_comes_back_as_it_was(
    first: list[EncodedExample], second: list[EncodedExample], data: st.DataObject
) -> None:
    plain = [*first, *second]
    kept = Examples.of(first) + Examples.of(second)
    assert [facts(item) for item in kept] == [facts(item) for item in plain]
    assert kept.lengths.tolist() == lengths_of(plain).tolist()
    assert kept.num_supervised == sum(int(item.supervised.sum()) for item in plain)
    wanted = data.draw(st.lists(st.booleans(), min_size=len(plain), max_size=len(plain)))
    chosen = kept.where(np.array(wanted, dtype=bool))
    picked = [item for item, is_wanted in zip(plain, wanted, strict=True) if is_wanted]
    assert [facts(item) for item in chosen] == [facts(item) for item in picked]
    assert chosen.num_supervised == sum(int(item.supervised.sum()) for item in picked)
    assert [facts(item) for item in kept[1::2]] == [facts(item) for item in plain[1::2]]


def test_changing_what_was_handed_out_changes_nothing() -> None:
    kept = Examples.of([example(5, seed=0)])
    kept[0].input_ids[:] = 0
    kept[0].weights[:] = 0
    assert kept[0].input_ids.any()
    assert kept[0].supervised.any()


def held_over_file(path: Path) -> float:
    """Bytes that prepared data holds for each byte of its file."""
    spec = TrainSpec(base=path.parent, data=path, batch=BatchSpec(max_sequence_length=8192))
    tokenizer = demo_tokenizer()
    tracemalloc.start()
    try:
        prepare(spec, tokenizer)  # what the first use of tokenizer and template leaves behind is not data
        before, _ = tracemalloc.get_traced_memory()
        data = prepare(spec, tokenizer)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(data.train) > 0
    return held / path.stat().st_size


def test_prepared_dialogues_take_at_most_their_files_size_and_a_half(tmp_path: Path) -> None:
    short = tenant_file(tmp_path / "short.jsonl", count=600)
    chats = [body["messages"] for line in short.open() if "messages" in (body := json.loads(line))]
    talks = [[turn for chat in chats[start:] for turn in chat if turn["role"] != "system"][:30] for start in range(20)]
    long = write_jsonl(tmp_path / "long.jsonl", ({"messages": talk} for talk in talks))
    assert held_over_file(short) <= 1.5
    assert held_over_file(long) <= 1.5

"""A spec's data, prepared twice, is the same data; the marked sample says what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.demo.assets import BASE_FOLDER
from server.demo.recipe.styles import Style
from support.trainers.training_data import chat, chats, demo_tokenizer, tenant_file, write_jsonl
from trainer.data.dataset import ENOUGH, batches_of, enough_of, prepare
from trainer.data.encode import Encoder
from trainer.data.jsonl import DataLimits, read_jsonl
from trainer.data.problems import DataRejected
from trainer.data.sample import as_html, pick, runs_of
from trainer.data.types import DataCursor
from trainer.spec import BatchSpec, TrainSpec


def spec_of(data: Path, **changes: object) -> TrainSpec:
    return TrainSpec(base=BASE_FOLDER, data=data, **changes)  # type: ignore[arg-type]


def test_a_tenants_file_is_prepared_the_same_way_twice(tmp_path: Path) -> None:
    spec = spec_of(tenant_file(tmp_path / "law.jsonl"), mix=tenant_file(tmp_path / "med.jsonl", Style.MED, count=80))
    first, second = prepare(spec, demo_tokenizer()), prepare(spec, demo_tokenizer())
    assert first.facts == second.facts
    for one, other in zip(first.validation + first.train, second.validation + second.train, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.weights, other.weights)
    facts = first.facts
    assert (facts.num_validation, facts.num_general) == (len(first.validation), len(first.general))
    assert facts.num_mixed / facts.num_train == pytest.approx(0.05, abs=0.01)
    assert facts.kinds == {"chat": 150, "completion": 50}
    assert facts.num_supervised == sum(int(item.supervised.sum()) for item in first.train)
    learned = {item.digest for item in first.train}
    assert not learned & {item.digest for item in first.validation + first.general}


def test_what_is_held_out_is_not_mixed_in_again(tmp_path: Path) -> None:
    data, other = chats(40), [chat(f"Name {number}.", "No.") for number in range(40)]
    held_out = write_jsonl(tmp_path / "v.jsonl", other[:20])
    mix = write_jsonl(tmp_path / "mix.jsonl", other)
    spec = spec_of(write_jsonl(tmp_path / "data.jsonl", data), validation=held_out, mix=mix, mix_fraction=0.5)
    prepared = prepare(spec, demo_tokenizer())
    assert prepared.facts.num_mixed
    assert not {item.digest for item in prepared.train} & {item.digest for item in prepared.validation}


def test_a_validation_file_is_kept_out_of_training(tmp_path: Path) -> None:
    records = chats(40)
    spec = spec_of(
        write_jsonl(tmp_path / "data.jsonl", records), validation=write_jsonl(tmp_path / "v.jsonl", records[:5])
    )
    data = prepare(spec, demo_tokenizer())
    assert (len(data.train), len(data.validation)) == (35, 5)
    assert data.facts.validation_digest is not None
    assert data.facts.validation_digest != data.facts.data_digest


@pytest.mark.parametrize("field", ["validation", "mix"])
def test_a_bad_second_file_is_named_by_its_field(tmp_path: Path, field: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n')
    spec = spec_of(write_jsonl(tmp_path / "data.jsonl", chats(40)), **{field: bad})
    with pytest.raises(DataRejected) as refused:
        prepare(spec, demo_tokenizer())
    assert (refused.value.param, refused.value.line, refused.value.code) == (field, 1, "wrong_type")


def test_a_sequence_longer_than_the_base_takes_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*chats(20), chat("a", "word " * 200)])
    with pytest.raises(DataRejected, match=r"line 21: the example has \d+ tokens, at most 100 fit"):
        prepare(spec_of(path), demo_tokenizer(), max_model_len=100)


def test_the_steps_follow_the_specs_batch(tmp_path: Path) -> None:
    batch = BatchSpec(examples=5, max_sequence_length=64, micro_tokens=128)
    spec = spec_of(write_jsonl(tmp_path / "data.jsonl", chats(40)), batch=batch)
    train = prepare(spec, demo_tokenizer()).train
    shares = [batches_of(spec, train, rank=rank, world_size=2).at(DataCursor()).micro_batches for rank in (0, 1)]
    assert sum(part.num_examples for share in shares for part in share) == 5
    assert max(part.num_tokens for part in shares[1]) <= 128


def test_a_sample_marks_what_is_learned_and_escapes_the_rest(tmp_path: Path) -> None:
    tokenizer = demo_tokenizer()
    body = chat("Who <b>pays</b>?", "You & me.", "Sure?", "Yes.")
    body["messages"][3]["weight"] = 0.5  # type: ignore[index]
    dataset = read_jsonl(write_jsonl(tmp_path / "d.jsonl", [body]), DataLimits(min_examples=1))
    ((line, digest, record),) = dataset.records()
    (example,) = Encoder(tokenizer, max_sequence_length=512).encode(record, line=line, digest=digest)
    runs = runs_of(example, tokenizer)
    page = as_html(runs)
    assert "&lt;|assistant|&gt;</span><mark>You &amp; me.&lt;|end_of_turn|&gt;</mark><span>&lt;|user|&gt;" in page
    assert '<mark title="weight 0.5">Yes.&lt;|end_of_turn|&gt;</mark>' in page
    assert "<b>" not in page
    assert sum(run.num_tokens for run in runs) == len(example)


@pytest.mark.parametrize(("too_long", "lengths"), [("truncate", [100, 100]), ("drop", [])])
def test_long_examples_are_cut_or_left_out_by_choice_and_counted(
    tmp_path: Path, too_long: str, lengths: list[int]
) -> None:
    """One answer is cut; of another nothing would be left, so it is dropped in both."""
    long = [chat("Say it.", "word " * 300), chat("word " * 300, "No."), chat("Say it again.", "word " * 300)]
    path = write_jsonl(tmp_path / "data.jsonl", [*chats(40), *long])
    with pytest.raises(DataRejected, match=r"at most 100 fit; batch.too_long.*and 2 more problems"):
        prepare(spec_of(path, batch={"max_sequence_length": 100}), demo_tokenizer())
    spec = spec_of(path, batch={"max_sequence_length": 100, "too_long": too_long})
    data = prepare(spec, demo_tokenizer())
    assert [len(item) for item in [*data.train, *data.validation] if len(item) >= 100] == lengths
    assert data.facts.to_mapping()["num_too_long"] == 3
    assert "num_too_long" not in prepare(spec_of(path), demo_tokenizer()).facts.to_mapping()


def test_a_run_of_an_earlier_version_holds_out_what_it_held_out(tmp_path: Path) -> None:
    spec = spec_of(write_jsonl(tmp_path / "data.jsonl", chats(112)))
    held_out = [len(prepare(spec, demo_tokenizer(), enough=enough_of(made)).validation) for made in ({}, {ENOUGH: 32})]
    assert held_out == [8, 22]


def test_a_sample_is_spread_over_the_file(tmp_path: Path) -> None:
    data = prepare(spec_of(write_jsonl(tmp_path / "data.jsonl", chats(112))), demo_tokenizer())
    assert [item.line for item in pick(data.train, 3)] == [data.train[index].line for index in (0, 30, 60)]
    assert [item.line for item in pick(data.train, 60)][-1] == data.train[88].line, "fewer than two for each"
    assert len(pick(data.train, 1000)) == len(data.train)

"""Preference pairs from a line to a judged adapter: what DPO computes is what its paper says of the base's logits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adapters_store.base.tokenizer import load_tokenizer
from server.demo.assets import demo_base_path
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style
from server.jobs.gate.process import Precision, gate_run
from support.models.models import save_base
from support.trainers.training import gradients, random_examples, tiny_spec
from support.trainers.training_data import write_jsonl
from trainer.data.dataset import prepare
from trainer.data.encode import Encoder
from trainer.data.packing import pack
from trainer.data.problems import DataRejected, LineRefused
from trainer.data.records import parse_record
from trainer.data.types import EncodedExample
from trainer.gate.answers.preference import judge_preference, measure_preference
from trainer.gate.scorer import BASE_ALONE, Losses
from trainer.gate.thresholds import GateThresholds
from trainer.model.model import Trainee, load
from trainer.report.card import card
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import Exit
from trainer.spec import DPO_RATE, OptimSpec, SpecError, TrainSpec

CPU = torch.device("cpu")
BETA = 0.3


def pair_of(chosen: EncodedExample, rejected: EncodedExample) -> EncodedExample:
    ids = np.concatenate([chosen.input_ids, rejected.input_ids])
    return EncodedExample(ids, np.concatenate([chosen.weights, -rejected.weights]), chosen.digest)


def log_p(trainee: Trainee, text: EncodedExample) -> Tensor:
    """Of the text's learned tokens, from transformers' own forward of this text alone."""
    ids = torch.from_numpy(text.input_ids).long()[None]
    positions = torch.arange(len(text))[None]
    with trainee.own_attention():
        logits_TV = trainee.logits(ids, positions)
    rows = torch.from_numpy(np.flatnonzero(text.weights)) - 1
    return logits_TV.log_softmax(dim=-1)[rows, ids[0, rows + 1]].sum()


def naive_loss(trainee: Trainee, pair: EncodedExample) -> Tensor:
    sides = [pair.text(chosen=True), pair.text(chosen=False)]
    assert trainee.peft is not None
    with torch.no_grad(), trainee.peft.disable_adapter():
        chosen_0, rejected_0 = (log_p(trainee, side) for side in sides)
    chosen, rejected = (log_p(trainee, side) for side in sides)
    return -logsigmoid(BETA * ((chosen - chosen_0) - (rejected - rejected_0)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_of_packed_pairs_and_its_gradient_are_the_papers(tmp_path: Path, family: str) -> None:
    spec = tiny_spec(save_base(tmp_path / "base", family), method="dpo", dpo={"beta": BETA})
    trainee = load(spec, CPU)
    torch.manual_seed(0)
    for weight in trainee.trained():
        torch.nn.init.normal_(weight, std=0.1)
    chosen, rejected = random_examples(4, seed=1), random_examples(4, seed=2)
    pairs = [pair_of(*sides) for sides in zip(chosen, rejected, strict=True)]
    batch = pack(pairs)
    assert batch.weight == 4
    loss = trainee.loss(batch)
    loss.backward()
    ours = gradients(trainee.trained())
    for weight in trainee.trained():
        weight.grad = None
    naive = torch.stack([naive_loss(trainee, pair) for pair in pairs]).sum()
    naive.backward()
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    assert abs(float(loss.detach()) / 4 - math.log(2)) > 0.01  # the adapter is not the base
    reference = gradients(trainee.trained())
    assert (ours - reference).norm() <= 1e-4 * reference.norm()


def test_a_pair_is_both_texts_as_they_are_learned_alone_and_ends_with_what_is_learned() -> None:
    encoder = Encoder(load_tokenizer(demo_base_path()), max_sequence_length=256)
    asked: list[Any] = [{"role": "user", "content": "Who pays?"}, {"role": "assistant", "content": "For what?"}]
    asked.append({"role": "user", "content": "Repairs."})
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "A."), ("rejected", "B!"))}
    (pair,) = encoder.encode(parse_record(json.dumps({"prompt": asked, **answers}).encode()))
    assert pair.border
    for name, side in (("chosen", pair.text(chosen=True)), ("rejected", pair.text(chosen=False))):
        asked[1]["weight"] = 0
        line = json.dumps({"messages": [*asked, *answers[name]]})
        (alone,) = encoder.encode(parse_record(line.encode()))
        end = int(np.flatnonzero(alone.weights)[-1]) + 1
        assert np.array_equal(side.input_ids, alone.input_ids[:end])
        assert np.array_equal(side.weights, alone.weights[:end])
    assert pack([pair, pair]).position_ids.eq(0).sum() == 4


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rejected": "A."}, "nothing_supervised"),
        ({"rejected": [{"role": "assistant", "content": "B"}]}, "wrong_type"),
        ({"prompt": None}, "wrong_type"),
        ({"rejected": " "}, "empty_content"),
        ({"score": 3}, "unknown_key"),
    ],
)
def test_a_line_that_is_no_pair_of_two_answers_is_refused(changes: dict[str, Any], code: str) -> None:
    body = {"prompt": "Q?", "chosen": "A.", "rejected": "B.", **changes}
    with pytest.raises(LineRefused) as refused:
        parse_record(json.dumps(body).encode())
    assert refused.value.code == code


@pytest.mark.parametrize("too_long", ["refuse", "drop", "truncate"])
def test_a_pair_that_is_too_long_is_refused_dropped_or_cut_to_half_for_each_answer(too_long: Any) -> None:
    encoder = Encoder(load_tokenizer(demo_base_path()), max_sequence_length=24, too_long=too_long)
    line = json.dumps({"prompt": "Q:", "chosen": "tenant " * 40, "rejected": "no"}).encode()
    if too_long == "refuse":
        with pytest.raises(LineRefused, match=r"the pair has \d+ tokens, at most 24 fit"):
            encoder.encode(parse_record(line))
        of_a_small_base = Encoder(load_tokenizer(demo_base_path()), max_sequence_length=24, max_pair_tokens=2048)
        with pytest.raises(LineRefused, match=r"a text of the pair has \d+ tokens, at most 24 fit"):
            of_a_small_base.encode(parse_record(line))
        return
    found = encoder.encode(parse_record(line))
    assert [max(each.segments) for each in found] == ([] if too_long == "drop" else [12])
    assert encoder.num_too_long == 1


def test_a_spec_of_preferences_names_what_it_does_not_take(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, method="dpo")
    assert (spec.method, spec.objective, spec.optim.learning_rate) == ("lora", "dpo", DPO_RATE)
    assert tiny_spec(tmp_path).optim.learning_rate == OptimSpec().learning_rate
    assert TrainSpec.from_mapping(spec.to_mapping()) == spec
    for changes, field in (
        ({"method": "full", "objective": "dpo"}, "method"),
        ({"method": "dpo", "sharding": "fsdp"}, "sharding"),
        ({"method": "dpo", "mix": "general.jsonl"}, "mix"),
        ({"method": "dpo", "dpo": {"beta": 0}}, "dpo.beta"),
    ):
        with pytest.raises(SpecError) as refused:
            tiny_spec(tmp_path, **changes)
        assert refused.value.param == field


def pairs_file(path: Path, count: int = 60) -> Path:
    """The law tenant's answers over the medical tenant's."""
    both = (tenant_dialogues(style, count) for style in (Style.LAW, Style.MED))
    turns = ((law.turns[0], med.turns[0]) for law, med in zip(*both, strict=True))
    lines = [{"prompt": law.prompt, "chosen": law.answer, "rejected": med.answer} for law, med in turns]
    return write_jsonl(path, [line for line in lines if line["chosen"] != line["rejected"]])


def test_a_run_on_pairs_learns_to_prefer_and_passes_the_gate_with_a_card_that_says_so(tmp_path: Path) -> None:
    body = {
        "base": str(demo_base_path()),
        "data": str(pairs_file(tmp_path / "data.jsonl")),
        "method": "dpo",
        "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "optim": {"learning_rate": 2e-3, "max_steps": 6},
        "batch": {"examples": 8, "max_sequence_length": 512},
    }
    run = tmp_path / "run"
    assert train(TrainSpec.from_mapping(body), run) is Exit.SUCCEEDED
    first = next(event for event in read_events(run) if event["type"] == "eval")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the adapter is the base
    found = gate_run(run, Precision(dtype="float32"))
    assert found.preference is not None
    assert found.preference.margin.low > 0
    assert found.preference.accuracy > 0.9
    assert found.verdict != "block", found.reasons
    assert "prefers chosen answers on" in (run / "report.html").read_text()
    report = json.loads((run / "report.json").read_text())
    text = card("liked", base_name="demo", base_digest="sha256:0", config={"r": 4, "lora_alpha": 8}, report=report)
    assert f"## The gate: {found.verdict}" in text
    assert report["result"]["provenance"]["data_digest"] in text
    assert f"held-out loss | {math.log(2):.3f} before" in text
    assert f"{found.preference.accuracy:.0%} of pairs above 0" in text


@dataclass
class KnownMargins:
    """A scorer whose adapter makes each chosen answer less costly by its margin, and dearer by `rise` as all are."""

    margins: list[float]
    rise: float = 0.0
    vocab_size: int = 100

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        nll = np.full(len(examples), 10.0)
        if scale != BASE_ALONE:
            nll += self.rise * np.array([example.weight for example in examples])
            is_chosen = examples[0].input_ids[-1] == 5
            nll -= np.array(self.margins) if is_chosen else 0
        return Losses(nll, np.array([example.weight for example in examples]))


@pytest.mark.parametrize(
    ("margins", "rise", "codes"),
    [
        ([1.0, 0.5, 2.0, 0.1, 0.7, 3.0, 0.2, 0.9], 0.0, set()),
        ([1.0, -0.9, 0.8, -1.1, 0.3, -0.2, 0.6, -0.7], 0.0, {"preference_unclear"}),
        ([-1.0, -0.5, -2.0, -0.1, -0.7, -3.0, -0.2, -0.9], 0.0, {"prefers_rejected", "chosen_less_likely"}),
        ([1.0, 2.0, 3.0], 0.0, {"few_examples"}),
        ([1.0, 0.5, 2.0, 0.1, 0.7, 3.0, 0.2, 0.9], 2.0, {"chosen_less_likely"}),
        ([math.nan] * 8, 0.0, {"non_finite_loss"}),
    ],
)
def test_held_out_margins_decide_what_the_gate_says(margins: list[float], rise: float, codes: set[str]) -> None:
    weights = np.array([0, 1, 1], dtype=np.float32)
    chosen, rejected = (EncodedExample(np.array([3, 4, last], dtype=np.int32), weights) for last in (5, 6))
    limits = GateThresholds()
    found = measure_preference(KnownMargins(margins, rise), [pair_of(chosen, rejected)] * len(margins), limits)
    assert {reason.code for reason in judge_preference(found, limits)} == codes
    assert found.accuracy == np.mean(np.array(margins) > 0)


def test_pairs_are_trained_as_pairs_only_and_other_lines_as_others(tmp_path: Path) -> None:
    pairs_file(tmp_path / "pairs.jsonl")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"Tenant {number} pays."} for number in range(20)])
    for objective, name, code in (
        ("supervised", "pairs", "preference_data"),
        ("dpo", "texts", "no_preference_data"),
    ):
        spec = tiny_spec(demo_base_path(), objective=objective, data=str(tmp_path / f"{name}.jsonl"))
        with pytest.raises(DataRejected) as refused:
            prepare(spec, load_tokenizer(demo_base_path()))
        assert refused.value.code == code

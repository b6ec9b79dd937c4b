"""An activated LoRA (aLoRA) in training: PEFT's loss and gradients on packed examples, and what a run of it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from adapters_store.base.tokenizer import load_tokenizer
from adapters_store.format.invocation import last_place
from server.demo.assets import demo_base_path
from server.jobs.gate.process import Precision, gate_run
from support.models.models import VOCAB, save_base
from support.trainers.training import demo_spec, gradients, tiny_spec
from trainer.data.dataset import prepare
from trainer.data.packing import pack
from trainer.data.problems import DataRejected
from trainer.data.types import EncodedExample
from trainer.model.adapter import adapter_tensors
from trainer.model.model import load
from trainer.run import train
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import Exit
from trainer.spec import SpecError, TrainSpec

CPU = torch.device("cpu")
INVOCATION = [7, 3]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def example(length: int, *places: int, seed: int) -> EncodedExample:
    """Random tokens with the invocation at `places`; what follows the last one is learned."""
    ids = np.random.default_rng(seed).integers(10, VOCAB, length).astype(np.int32)
    for place in places:
        ids[place : place + 2] = INVOCATION
    start = places[-1] + 2 if places else length // 2
    return EncodedExample(ids, (np.arange(length) >= start).astype(np.float32))


EXAMPLES = [example(20, 9, seed=1), example(13, 0, seed=2), example(17, 2, 11, seed=3), example(9, seed=4)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradient_are_pefts_one_example_at_a_time(tmp_path: Path, checkpointing: bool) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = {"rank": 4, "target_modules": TARGETS, "alora_invocation_tokens": INVOCATION}
    trainee = load(tiny_spec(base, adapter=adapter, checkpointing=checkpointing), CPU)
    assert trainee.peft is not None
    generator = torch.Generator().manual_seed(0)
    for weight in trainee.trained():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    causal = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = get_peft_model(causal, trainee.peft.peft_config["default"])
    set_peft_model_state_dict(theirs, adapter_tensors(trainee.peft))
    total = torch.zeros(())
    for each in EXAMPLES:
        ids = torch.from_numpy(each.input_ids).long()[None]
        labels = ids.masked_fill(torch.from_numpy(each.weights)[None] == 0, -100)
        total = total + theirs(input_ids=ids, labels=labels).loss * int(each.supervised.sum())
    total.backward()
    loss = trainee.loss(pack(EXAMPLES))
    loss.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    own = gradients([weight for weight in theirs.parameters() if weight.requires_grad])
    mine = gradients(trainee.trained())
    assert own.norm() > 0
    assert (mine - own).norm() <= 1e-5 * own.norm()


def test_a_run_learns_last_answers_and_is_served_and_gated_as_peft_computes_it(tmp_path: Path) -> None:
    """The round trip of the gate compares the served logits with PEFT's, in float32, at every position."""
    adapter = {"rank": 4, "alora_invocation_tokens": "<|assistant|>"}
    spec, run = demo_spec(tmp_path, adapter=adapter, eval_samples=1), tmp_path / "run"
    assert train(spec, run) is Exit.SUCCEEDED
    [token] = load_tokenizer(demo_base_path()).encode("<|assistant|>", add_special_tokens=False)
    resolved = TrainSpec.from_yaml(run / "spec.yaml")
    assert resolved.adapter.invocation == (token,)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["alora_invocation_tokens"], config["task_type"]) == ([token], "CAUSAL_LM")
    for each in prepare(resolved, load_tokenizer(demo_base_path())).train:
        place = last_place(each.input_ids.tolist(), [token])
        assert place is not None
        assert np.flatnonzero(each.weights).tolist() == list(range(place + 1, len(each)))
    assert any(event["type"] == "sample" and event["step"] > 0 for event in read_events(run))
    result = gate_run(run, Precision(dtype="float32"))
    assert result.round_trip is not None, result.reasons
    assert result.round_trip.difference <= 1e-4
    assert result.held_out is not None
    assert result.held_out.gain.low > 0.1
    assert result.held_out.base_loss > 1.1 * result.held_out.adapter_loss


@pytest.mark.parametrize(
    ("prompt", "answer", "code"),
    [("plain", "yes", "invocation_missing"), ("JUDGE: x", "no JUDGE: y", "invocation_in_answer")],
)
def test_a_line_that_could_not_be_served_so_is_refused_with_its_number(
    tmp_path: Path, prompt: str, answer: str, code: str
) -> None:
    tokenizer = load_tokenizer(demo_base_path())
    ids = tokenizer.encode("JUDGE:", add_special_tokens=False)
    lines = [{"prompt": f"{index} JUDGE: good", "completion": " yes"} for index in range(20)]
    lines[6] = {"prompt": prompt, "completion": f" {answer}"}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = demo_spec(tmp_path, adapter={"alora_invocation_tokens": ids})
    with pytest.raises(DataRejected) as refused:
        prepare(spec, tokenizer)
    assert (refused.value.line, refused.value.code) == (7, code)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"adapter": {"alora_invocation_tokens": []}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"alora_invocation_tokens": ""}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"alora_invocation_tokens": [1, True]}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"alora_invocation_tokens": [-1]}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"alora_invocation_tokens": [1] * 257}}, "adapter.alora_invocation_tokens"),
        ({"method": "dora"}, "method"),
        ({"method": "full"}, "method"),
        ({"objective": "dpo"}, "objective"),
        ({"sharding": "fsdp"}, "sharding"),
        ({"mix": "mix.jsonl"}, "mix"),
        ({"initial_adapter": "before"}, "initial_adapter"),
        ({"adapter": {"alora_invocation_tokens": "\ud800"}}, "adapter.alora_invocation_tokens"),
        ({"adapter": {"init": "eva", "alora_invocation_tokens": [5]}}, "adapter.init"),
    ],
)
def test_what_an_activated_lora_cannot_be_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as refused:
        tiny_spec(Path("base"), **{"adapter": {"alora_invocation_tokens": [5]}, **changes})
    assert refused.value.param == field


def test_a_head_among_the_targets_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = {"rank": 4, "target_modules": ["q_proj", "lm_head"], "alora_invocation_tokens": INVOCATION}
    with pytest.raises(SpecError, match="without lm_head") as refused:
        load(tiny_spec(base, adapter=adapter), CPU)
    assert refused.value.param == "adapter.target_modules"

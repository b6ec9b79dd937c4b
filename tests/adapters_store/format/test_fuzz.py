"""Mutated uploads: nothing but AdapterRejected comes out, and what is accepted means to PEFT what it means to us.

MULTILORA_FUZZ multiplies the 20,000 mutants (500: ten million, an hour); hypothesis, which remembers its examples,
draws 20 times as many at most. MULTILORA_FUZZ_SEED draws others.
"""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.errors import AdapterRejected
from adapters_store.format.config import parse_config
from adapters_store.format.config_fields import FREE_FIELDS
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import read_header
from adapters_store.format.validate import AdapterPlan, plan_adapter
from adapters_store.packed.packing import pack
from support.models.adapter_files import (
    HIDDEN,
    INTERMEDIATE,
    NUM_LAYERS,
    PEFT_DEFAULTS,
    config_bytes,
    data_of,
    header_of,
    lora_tensors,
    safetensors_bytes,
    tiny_base,
    write,
)

BASE = tiny_base()
LIMITS = AdapterLimits(max_bytes=1 << 20)
GOOD = lora_tensors(BASE)
GOOD_FILE = safetensors_bytes(GOOD)
MAX_CASE_S = 0.1
NUM_FILES = 6_000
NUM_CONFIGS = 4_000
FACTOR = int(os.environ.get("MULTILORA_FUZZ", "0"))
SEED = int(os.environ.get("MULTILORA_FUZZ_SEED", "2026"))
MOST_EXAMPLES_FACTOR = 20
HEADER_END = 8 + struct.unpack("<Q", GOOD_FILE[:8])[0]


def examples(count: int) -> settings:
    """The same examples on every run; MULTILORA_FUZZ multiplies their number and draws new ones."""
    return settings(
        max_examples=count * min(max(FACTOR, 1), MOST_EXAMPLES_FACTOR),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class FullCollections:
    """How long this thread was held up by collections of all that the process has: torch, PEFT, earlier tests. One
    takes 250 ms, of whichever case it falls into; collections of what is new are the case's own."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._began_s = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began_s = time.thread_time()
        else:
            self.spent_s += time.thread_time() - self._began_s


full_collections = FullCollections()


@pytest.fixture(autouse=True, scope="module")
def _collections_are_timed() -> Iterator[None]:
    gc.callbacks.append(full_collections)
    yield
    gc.callbacks.remove(full_collections)


def accepted(config: bytes, weights: Path) -> AdapterPlan | None:
    """The plan of an accepted upload, None for a refused one; any other error escapes and fails the test.

    No case may take longer than MAX_CASE_S of this thread in the best of three tries: others on the machine do not
    count.
    """
    for _ in range(3):
        start_s = time.thread_time() - full_collections.spent_s
        plan = _accepted(config, weights)
        if time.thread_time() - full_collections.spent_s - start_s < MAX_CASE_S:
            return plan
    raise AssertionError(f"three times longer than {MAX_CASE_S} s: {config[:200]!r}")


def _accepted(config: bytes, weights: Path) -> AdapterPlan | None:
    try:
        plan = plan_adapter(parse_config(config, LIMITS), read_header(weights, LIMITS), BASE, LIMITS)
        pack(plan, weights, check=True)
    except AdapterRejected as error:
        refusal = error
    else:
        return plan
    assert refusal.code.isidentifier()
    assert refusal.message.isprintable()
    return None


def mutate(data: bytearray, dice: random.Random, end: int) -> None:
    """Change, drop, insert, repeat or swap some bytes before `end`."""
    start = dice.randrange(end)
    length = dice.choice([1, 1, 1, 2, 8, 40])
    match dice.randrange(5):
        case 0:
            data[start] = (
                dice.choice(b'0123456789-"{}[]:,.\\ \x00\xffABFe') if dice.random() < 0.8 else dice.randrange(256)
            )
        case 1:
            del data[start : start + length]
        case 2:
            data[start:start] = bytes(dice.choice(b'09-{}[]",:eN.u\\') for _ in range(length))
        case 3:
            data[start:start] = data[start : start + length]
        case _:
            other = dice.randrange(end)
            data[start], data[other] = data[other], data[start]


def test_mutated_files_are_refused_or_sound(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    num_accepted = 0
    for _ in range(NUM_FILES * max(FACTOR, 1)):
        data = bytearray(GOOD_FILE)
        for _ in range(dice.choice([1, 1, 2, 4])):
            mutate(data, dice, HEADER_END)
        if dice.random() < 0.7:  # keep the length right, so that the JSON itself is what is tried
            grown = len(data) - len(GOOD_FILE)
            data[:8] = struct.pack("<Q", HEADER_END - 8 + grown)
        weights = write(tmp_path / "w", bytes(data))
        plan = accepted(config_bytes(), weights)
        if plan is not None:
            num_accepted += 1
            assert_read_as_safetensors_does(plan, weights)
    assert num_accepted > 0


def assert_read_as_safetensors_does(plan: AdapterPlan, weights: Path) -> None:
    """Not as the file was before: one mutant in 300,000 swaps two tensors' places by their digits, and is sound."""
    loaded = safetensors.torch.load_file(weights)
    assert sorted(loaded) == sorted(GOOD)
    ours = our_deltas(plan, weights)
    for module in plan.modules:
        prefix = f"base_model.model.{module.name}"
        a, b = loaded[f"{prefix}.lora_A.weight"], loaded[f"{prefix}.lora_B.weight"]
        torch.testing.assert_close(ours[module.name], b @ a * module.scale)


def test_tensors_in_each_others_place_are_read_where_the_header_says(tmp_path: Path) -> None:
    header = header_of(GOOD)
    one, other = (f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_A.weight" for layer in (0, 1))
    places = header[one]["data_offsets"], header[other]["data_offsets"]
    header[other]["data_offsets"], header[one]["data_offsets"] = places
    raw = json.dumps(header).encode()
    weights = write(tmp_path / "w", struct.pack("<Q", len(raw)) + raw + data_of(GOOD))
    plan = accepted(config_bytes(), weights)
    assert plan is not None
    assert_read_as_safetensors_does(plan, weights)


def test_mutated_config_bytes_are_refused_or_say_what_peft_reads(tmp_path: Path) -> None:
    """Bytes changed without regard to JSON; what is still accepted must scale as PEFT's own config class says."""
    dice = random.Random(SEED + 1)
    weights = write(tmp_path / "w", GOOD_FILE)
    good = config_bytes(use_rslora=True, lora_alpha=7)
    num_accepted = 0
    for _ in range(NUM_CONFIGS * max(FACTOR, 1)):
        data = bytearray(good)
        for _ in range(dice.choice([1, 1, 2, 4])):
            mutate(data, dice, len(data))
        plan = accepted(bytes(data), weights)
        if plan is None:
            continue
        num_accepted += 1
        known = {key: value for key, value in json.loads(data).items() if key in PEFT_DEFAULTS}
        theirs = LoraConfig(**{**known, "peft_type": "LORA"})
        scale = theirs.lora_alpha / (theirs.r**0.5 if theirs.use_rslora else theirs.r)
        packed = pack(plan, weights)
        assert not theirs.alpha_pattern
        assert all(module.scale == pytest.approx(scale) for module in packed.modules), bytes(data)
        assert all(module.rank == theirs.r == 4 for module in packed.modules)
    assert num_accepted > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@examples(200)
@given(data=st.data())
def test_any_json_in_a_tensors_entry_is_refused_or_sound(data: st.DataObject, tmp_path: Path) -> None:
    header: dict[str, Any] = header_of(GOOD)
    name = data.draw(st.sampled_from(sorted(header)))
    part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    value = data.draw(JSON)
    if part is None:
        header[name] = value
    else:
        header[name][part] = value
    raw = json.dumps(header).encode()
    weights = write(tmp_path / "w", struct.pack("<Q", len(raw)) + raw + data_of(GOOD))
    plan = accepted(config_bytes(), weights)
    if plan is not None:
        assert_read_as_safetensors_does(plan, weights)


# Values near the ones that mean something, so that many mutants are accepted; free fields are told apart by type only,
# and the *_config objects among them are parsed by PEFT for initialisation alone.
NAMES = st.sampled_from(
    ["q_proj", "v_proj", "k_proj", "self_attn.q_proj", "layers.0.self_attn.v_proj", "", "proj", "."]
)
KEYS = NAMES | st.sampled_from(["^q_proj", "^model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "q.proj"])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "r": st.sampled_from([4, 2, 0, -1, 4.0, True]),
    "lora_alpha": st.integers(-5, 40) | st.floats(-1e7, 1e7) | st.none(),
    "use_rslora": st.booleans() | st.none(),
    "target_modules": st.lists(NAMES, max_size=4) | st.sampled_from(["all-linear", "ALL-LINEAR", "q_proj"]),
    "exclude_modules": st.lists(NAMES, max_size=2) | st.none(),
    "rank_pattern": st.dictionaries(KEYS, st.sampled_from([4, 4, 4, 3, 0]), max_size=3),
    "alpha_pattern": st.dictionaries(KEYS, st.integers(0, 64), max_size=4),
    "layers_to_transform": st.sampled_from([None, [], [0, 1], [0], 1, [0, 1, 9], -1]),
    "layers_pattern": st.sampled_from([None, [], "layers", ["layers"], "lay.rs", ["h", "layers"]]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "eva", "mica", "pissa", None, "olora"]),
    "bias": st.sampled_from(["none", "all", None]),
    "task_type": st.sampled_from(["CAUSAL_LM", None, "SEQ_CLS"]),
}
OTHER = sorted(PEFT_DEFAULTS.keys() - VALUES.keys() - {name for name in FREE_FIELDS if name.endswith("_config")})


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    shape = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": NUM_LAYERS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=4, num_key_value_heads=2, **shape))


def pefts_deltas(llama: LlamaForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each linear layer's weight, having loaded the adapter; zero deltas left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(llama, str(folder), low_cpu_mem_usage=False)
    layers = {name: layer for name, layer in llama.named_modules() if isinstance(layer, LoraLayer)}
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    model.unload()
    return {name: delta for name, delta in deltas.items() if delta.any()}


def our_deltas(plan: AdapterPlan, weights: Path) -> dict[str, torch.Tensor]:
    packed = pack(plan, weights)
    deltas = {}
    for module in packed.modules:
        shape = BASE.modules[module.name]
        a = packed.buffer[module.a_offset :][: module.rank * shape.in_features].view(module.rank, -1)
        b = packed.buffer[module.b_offset :][: module.rank * shape.out_features].view(module.rank, -1)
        deltas[module.name] = b.T @ a * module.scale
    return {name: delta for name, delta in deltas.items() if delta.any()}


@examples(250)
@given(data=st.data())
def test_mutated_configs_are_refused_or_mean_the_same_to_peft(
    data: st.DataObject, tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    changes = {
        field: data.draw(VALUES[field], label=field)
        for field in data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=3, unique=True))
    }
    if data.draw(st.integers(0, 3)) == 0:
        changes[data.draw(st.sampled_from(OTHER))] = data.draw(JSON)
    config = config_bytes(**changes)
    write(tmp_path / "adapter_config.json", config)
    weights = write(tmp_path / "adapter_model.safetensors", GOOD_FILE)
    plan = accepted(config, weights)
    if plan is not None:
        theirs, ours = pefts_deltas(llama, tmp_path), our_deltas(plan, weights)
        assert theirs.keys() == ours.keys()
        for name, delta in theirs.items():
            torch.testing.assert_close(ours[name], delta)


@examples(100)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    assert accepted(data, write(tmp_path / "w", GOOD_FILE)) is None
    assert accepted(config_bytes(), write(tmp_path / "w", data)) is None


@examples(100)
@given(field=st.text(max_size=12), value=JSON)
def test_any_unknown_field_is_refused_unless_empty_or_a_note(field: str, value: object, tmp_path: Path) -> None:
    plan = accepted(config_bytes(**{field: value}), write(tmp_path / "w", GOOD_FILE))
    if field not in PEFT_DEFAULTS and (value or value == 0) and value is not False and not isinstance(value, str):
        assert plan is None or field == "runtime_config"

"""The strict reader of adapter_config.json: PEFT's meaning exactly, and a code for every other."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters_store.errors import AdapterRejected
from adapters_store.format.config import parse_config
from adapters_store.format.config_fields import FIXED_FIELDS, FREE_FIELDS, READ_FIELDS, UNSUPPORTED_FIELDS
from adapters_store.format.limits import AdapterLimits
from adapters_store.parsing.patterns import ModulePattern, SuffixPatterns
from support.models.adapter_files import PEFT_DEFAULTS, config_bytes
from support.stopwatch import quiet_s

LIMITS = AdapterLimits()


def refusal(data: bytes) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        parse_config(data, LIMITS)
    return caught.value


def test_every_field_that_peft_writes_is_known() -> None:
    known = READ_FIELDS | FREE_FIELDS.keys() | UNSUPPORTED_FIELDS.keys() | FIXED_FIELDS.keys()
    assert PeftLoraConfig(target_modules=["q_proj"]).to_dict().keys() <= known
    assert PEFT_DEFAULTS.keys() == PeftLoraConfig(target_modules=["q_proj"]).to_dict().keys()


def test_what_peft_writes_by_default_is_read() -> None:
    config = parse_config(config_bytes(), LIMITS)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, False)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inference_mode", False),
        ("revision", "abc"),
        ("base_model_name_or_path", None),
        ("task_type", None),
        ("lora_dropout", 0),
        ("peft_version", "0.5"),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "y"}),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("eva_config", {"rho": 2.0}),
        ("megatron_core", None),
        ("modules_to_save", []),
        ("exclude_modules", ["lm_head"]),
        ("exclude_modules", ".*vision.*"),
        ("target_modules", ".*q_proj"),
        ("domain", "law"),
        ("target_modules", "all-linear"),
        ("merge_weights", False),
        ("enable_lora", None),
    ],
)
def test_fields_that_change_no_meaning_are_accepted(field: str, value: object) -> None:
    assert parse_config(config_bytes(**{field: value}), LIMITS).scale_of("x.q_proj") == 2.0


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("bias", "all", "unsupported_bias"),
        ("bias", None, "unsupported_bias"),
        ("lora_bias", True, "unsupported_bias"),
        ("modules_to_save", ["score"], "unsupported_modules_to_save"),
        ("layer_replication", [[0, 4], [2, 5]], "unsupported_layer_replication"),
        ("trainable_token_indices", [1], "unsupported_trainable_tokens"),
        ("target_parameters", "experts.up_proj", "bad_field"),
        ("target_parameters", [3], "bad_field"),
        ("use_qalora", True, "unsupported_qalora"),
        ("use_qalora", 1, "unsupported_qalora"),
        ("arrow_config", {"top_k": 1}, "unsupported_arrow"),
        ("use_bdlora", {"nblocks": 2}, "unsupported_bdlora"),
        ("use_bdlora", {}, "unsupported_bdlora"),
        ("kasa_config", {"beta": 1.0}, "unsupported_kasa"),
        ("kasa_config", {}, "unsupported_kasa"),
        ("alora_invocation_tokens", [], "bad_field"),
        ("alora_invocation_tokens", [1, -1], "bad_field"),
        ("alora_invocation_tokens", [1, True], "bad_field"),
        ("alora_invocation_tokens", [1] * 257, "bad_field"),
        ("alora_invocation_tokens", "<judge>", "bad_field"),
        ("use_dora", 0, "unsupported_dora"),
        ("rank_pattern", [], "bad_field"),
        ("velora_config", {"scale": 1.0}, "unsupported_velora"),
        ("monteclora_config", {"num_samples": 1}, "unsupported_monteclora"),
        ("megatron_config", {"x": 1}, "unsupported_megatron"),
        ("ensure_weight_tying", True, "unsupported_weight_tying"),
        ("init_lora_weights", "pissa_niter_16", "base_altering_init"),
        ("init_lora_weights", "OLoRA", "base_altering_init"),
        ("init_lora_weights", "corda", "base_altering_init"),
        ("init_lora_weights", "loftq", "base_altering_init"),
        ("loftq_config", {"loftq_bits": 4}, "base_altering_init"),
        ("init_lora_weights", "whatever", "bad_field"),
        ("peft_type", "ADALORA", "unsupported_peft_type"),
        ("task_type", "SEQ_CLS", "unsupported_task_type"),
        ("target_modules", None, "bad_field"),
        ("target_modules", [], "bad_field"),
        ("target_modules", ["q_proj", 3], "bad_field"),
        ("rank_pattern", {"(a+)+$": 4}, "regex_pattern"),
        ("alpha_pattern", {"q_proj|v_proj": 4}, "regex_pattern"),
        ("layers_pattern", ["lay.rs"], "bad_field"),
        ("rank_pattern", {"q_proj": 0}, "bad_field"),
        ("rank_pattern", {"q_proj": 4.0}, "bad_field"),
        ("alpha_pattern", {"q_proj": True}, "bad_field"),
        ("r", 0, "bad_field"),
        ("r", True, "bad_field"),
        ("r", 8.0, "bad_field"),
        ("lora_alpha", 1e30, "bad_field"),
        ("lora_alpha", "16", "bad_field"),
        ("use_rslora", "yes", "bad_field"),
        ("lora_dropout", -0.1, "bad_field"),
        ("lora_dropout", True, "bad_field"),
        ("inference_mode", "yes", "bad_field"),
        ("layers_to_transform", [True], "bad_field"),
        ("multilora_base_digest", 3, "bad_field"),
        ("some_new_feature", True, "unknown_field"),
        ("some_new_feature", 0, "unknown_field"),
        ("multilora_new", "x", "unknown_field"),
    ],
)
def test_other_meanings_are_refused_by_code_and_field(field: str, value: object, code: str) -> None:
    error = refusal(config_bytes(**{field: value}))
    assert error.code == code
    assert error.param == field
    assert ("merge_and_unload" in error.message) == (field in ("lora_bias", "trainable_token_indices"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [f"m{index}" for index in range(8193)]),
        ("exclude_modules", [f"m{index}" for index in range(8193)]),
        ("rank_pattern", {f"m{index}": 1 for index in range(8193)}),
        ("alpha_pattern", {f"m{index}": 1 for index in range(8193)}),
        ("layers_to_transform", list(range(8193))),
    ],
)
def test_lists_and_patterns_have_a_length_that_is_named(field: str, value: object) -> None:
    error = refusal(config_bytes(**{field: value}))
    assert (error.code, error.param) == ("bad_field", field)
    assert "at most 8192" in error.message


def test_layers_cannot_be_chosen_of_all_linear() -> None:
    """PEFT would not look at them there, and the adapter would mean more layers than it says."""
    error = refusal(config_bytes(target_modules="all-linear", layers_to_transform=[1]))
    assert (error.code, error.param) == ("bad_field", "layers_to_transform")
    assert "absent if target_modules is 'all-linear'" in error.message


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_missing_field_is_named(field: str) -> None:
    body = {key: value for key, value in PEFT_DEFAULTS.items() if key != field}
    error = refusal(json.dumps(body).encode())
    assert (error.code, error.param) == ("missing_field", field)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_json"),
        (b"[]", "bad_json"),
        (b"{", "bad_json"),
        (b'{"r": 4, "r": 8}', "duplicate_key"),
        (config_bytes().replace(b'"rank_pattern": {}', b'"rank_pattern": {"a": 1, "a": 2}'), "duplicate_key"),
        (config_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": NaN'), "nan_literal"),
        (config_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": -Infinity'), "nan_literal"),
        (config_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999'), "bad_field"),
        (config_bytes().replace(b'"r": 4', b'"r": ' + b"9" * 6000), "bad_json"),
        (config_bytes().replace(b'"loftq_config": {}', b'"loftq_config": ' + b"[" * 9 + b"]" * 9), "too_deep"),
        (b"[" * 200_000, "too_deep"),
        (b'{"a": "\xff"}', "not_utf8"),
        (b'{"a":{}' + b',"a":{}' * 9000 + b"}", "too_many_objects"),
        (b" " * (1 << 20) + b"{}", "config_too_large"),
    ],
)
def test_json_with_two_readings_is_refused(data: bytes, code: str) -> None:
    assert refusal(data).code == code
    assert quiet_s(lambda: refusal(data)) < 0.1


def test_error_messages_hold_no_strange_characters() -> None:
    error = refusal(config_bytes(**{"bad\u202e\x00field\ud800": "x" * 10_000}))
    assert error.code == "unknown_field"
    assert error.message.isascii()
    assert error.message.isprintable()
    assert len(error.message) < 400


LETTERS = st.sampled_from(["q", "v", "ab", "q_proj", "0", "1", "12", "layers", "mlp"])
PATHS = st.lists(LETTERS, min_size=1, max_size=5).map(".".join)
KEYS = st.tuples(st.sampled_from(["", "", "", "^", ".*\\."]), PATHS | st.text("qv.a1", min_size=1, max_size=6)).map(
    "".join
)


@settings(max_examples=300)
@given(st.dictionaries(KEYS, st.integers(1, 99), max_size=6), PATHS)
def test_pattern_keys_match_as_in_peft(patterns: dict[str, int], name: str) -> None:
    expected = patterns.get(get_pattern_key(list(patterns), name), 7)
    assert SuffixPatterns(patterns.items()).find(name, 7) == expected


@settings(max_examples=200)
@given(
    targets=st.lists(PATHS, min_size=1, max_size=3),
    excluded=st.lists(PATHS, max_size=2),
    layers=st.none() | st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 12]), max_size=2),
    pattern=st.none() | st.just("layers") | st.lists(st.sampled_from(["layers", "mlp", "h"]), max_size=2),
    name=PATHS,
)
def test_targets_are_those_of_peft(
    targets: list[str], excluded: list[str], layers: object, pattern: object, name: str
) -> None:
    fields = {"target_modules": targets, "exclude_modules": excluded or None, "layers_to_transform": layers}
    fields["layers_pattern"] = pattern if layers is not None else None
    if layers == [] and pattern:
        fields["layers_pattern"] = None
    ours = parse_config(config_bytes(**fields), LIMITS)
    theirs = PeftLoraConfig(**fields)  # type: ignore[arg-type]
    assert ours.targets(name) == bool(check_target_module_exists(theirs, name))


ATOMS = st.sampled_from(
    ["q", "v", "a", "_proj", r"\.", ".", r"\d", "[qv]", "[^a]", r"\b", "^", "$", r"\w", "(?!q)", "0", r"\Z"]
)
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{,1}", "*+"])).map(
            "({0[0]}){0[1]}".format
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(REGEXES, PATHS)
def test_a_regular_expression_matches_what_pefts_does_or_is_not_decided(text: str, name: str) -> None:
    assert ModulePattern(text).matches(name) in (None, re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    "text", ["(?!a)b", r"(a)\1", "(?>a)b", "a{,2}", "[[:alpha:]]", r"a\Z", "x" * 5000, "((a{50}){50}){2}"]
)
def test_what_re2_reads_otherwise_or_cannot_hold_is_not_decided(text: str) -> None:
    assert not ModulePattern(text).is_decided


@pytest.mark.parametrize("text", ["(a+)+$", "(a|a)*b", "(.*a){25}b", "(?=(a+)+$)b"])
def test_a_hostile_regular_expression_ends_at_once(text: str) -> None:
    """Python's own would take years; here each of the names of a large base takes a part of a second at most."""
    assert ModulePattern(text).matches("a" * 400 + "c") in (None, False)


@pytest.mark.parametrize("version", ["0.22.0", "1.0", "0.100.3", "unknown"])
def test_a_text_of_a_later_peft_is_not_taken_for_a_note(version: str) -> None:
    assert refusal(config_bytes(variant="x", peft_version=version)).code == "unknown_field"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 3, 16, 7.3, -2, 0])
@pytest.mark.parametrize("rank", [1, 3, 6, 64])
def test_scale_is_pefts_float_exactly(use_rslora: bool, alpha: float, rank: int) -> None:
    config = parse_config(config_bytes(r=rank, lora_alpha=alpha, use_rslora=use_rslora), LIMITS)
    assert config.scale_of("q_proj") == (alpha / math.sqrt(rank) if use_rslora else alpha / rank)


def test_the_first_matching_pattern_wins() -> None:
    config = parse_config(config_bytes(rank_pattern={"layers.0.q_proj": 2, "q_proj": 8}), LIMITS)
    assert [config.rank_of(f"model.layers.{layer}.q_proj") for layer in (0, 1)] == [2, 8]
    assert config.rank_of("model.layers.0.xq_proj") == 4

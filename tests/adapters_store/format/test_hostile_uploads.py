"""Every bad upload: refused by its own code, within 100 ms, with nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from adapters_store.base.description import BaseDescription
from adapters_store.errors import AdapterRejected, InputRefused, NotFound
from adapters_store.format.limits import AdapterLimits
from adapters_store.storage.schema import metadata
from adapters_store.store import AdapterStore
from support.models.adapter_files import (
    PREFIX,
    Tensors,
    config_bytes,
    data_of,
    file_bytes,
    header_of,
    lora_tensors,
    safetensors_bytes,
    tiny_base,
    write,
)
from support.stopwatch import quiet_s

BASE = tiny_base()
GOOD = lora_tensors(BASE)
Q0_A, Q0_B = (f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


def with_tensor(name: str, array: np.ndarray[Any, Any]) -> bytes:
    return safetensors_bytes({**GOOD, name: array})


def with_header(change: Callable[[dict[str, Any]], None], data: bytes | None = None) -> bytes:
    header = header_of(GOOD)
    change(header)
    return file_bytes(header, data_of(GOOD) if data is None else data)


def renamed(old: str, new: str) -> bytes:
    return safetensors_bytes({new if name == old else name: array for name, array in GOOD.items()})


def without(name: str) -> bytes:
    return safetensors_bytes({key: array for key, array in GOOD.items() if key != name})


def with_value(value: float, dtype: type = np.float32) -> bytes:
    tensors: Tensors = {name: array.astype(dtype) for name, array in GOOD.items()}
    tensors[Q0_B][7, 1] = value
    return safetensors_bytes(tensors)


def overlapping(header: dict[str, Any]) -> None:
    header[Q0_B]["data_offsets"] = header[Q0_A]["data_offsets"]


def gap(header: dict[str, Any]) -> None:
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [position + 4 for position in entry["data_offsets"]]


def many_tensors(count: int) -> bytes:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return file_bytes(b"{" + b",".join(b'"t%d":%s' % (index, entry) for index in range(count)) + b"}", b"")


def torch_bin(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({Q0_A: torch.zeros(4, 32)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def duplicate_key() -> bytes:
    raw = json.dumps(header_of(GOOD)).encode()
    return file_bytes(raw[:-1] + b"," + json.dumps({Q0_A: header_of(GOOD)[Q0_A]}).encode()[1:], data_of(GOOD))


def set_entry(name: str, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


BAD_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\x01" * 7, "truncated"),
    "header cut": (safetensors_bytes(GOOD)[:200], "truncated"),
    "data cut": (safetensors_bytes(GOOD)[:-1], "truncated"),
    "data longer": (safetensors_bytes(GOOD) + b"\0", "trailing_bytes"),
    "header length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "header_too_large"),
    "200,000 tensors": (many_tensors(200_000), "header_too_large"),
    "15,000 tensors": (many_tensors(15_000), "too_many_tensors"),
    "header of brackets": (file_bytes(b'{"a":' + b"[" * 900_000, b""), "too_deep"),
    "header of numbers": (file_bytes(b'{"a":[' + b"1," * 450_000 + b"1]}", b""), "bad_header"),
    "pickle": (pickle.dumps({"x": 1}, protocol=4), "pickle"),
    "torch .bin": (torch_bin(zipped=True), "pickle"),
    "legacy torch .bin": (torch_bin(zipped=False), "pickle"),
    "not an object": (file_bytes(b"[]", b""), "bad_header"),
    "leading space": (file_bytes(b" {}", b""), "bad_header"),
    "not JSON": (file_bytes(b"{oops}", b""), "bad_json"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}', b""), "not_utf8"),
    "NaN literal": (file_bytes(b'{"a": {"dtype": NaN}}', b""), "nan_literal"),
    "no tensor": (file_bytes({"__metadata__": {"format": "pt"}}, b""), "no_tensors"),
    "metadata is a list": (with_header(lambda h: h.update(__metadata__=["x"])), "bad_header"),
    "metadata holds a number": (with_header(lambda h: h.update(__metadata__={"x": 1})), "bad_header"),
    "metadata holds half a character": (with_header(lambda h: h.update(__metadata__={"x": "\ud800"})), "bad_header"),
    "duplicate key": (duplicate_key(), "duplicate_key"),
    "traversal name": (with_header(lambda h: h.update({"../../etc/passwd": h.pop(Q0_A)})), "bad_tensor_name"),
    "dotted traversal": (with_header(lambda h: h.update({"base_model..model": h.pop(Q0_A)})), "bad_tensor_name"),
    "empty name": (with_header(lambda h: h.update({"": h.pop(Q0_A)})), "bad_tensor_name"),
    "long name": (with_header(lambda h: h.update({"a" * 513: h.pop(Q0_A)})), "bad_tensor_name"),
    "control character in name": (with_header(lambda h: h.update({"a\nb": h.pop(Q0_A)})), "bad_tensor_name"),
    "float64": (with_tensor(Q0_A, GOOD[Q0_A].astype(np.float64)), "wrong_dtype"),
    "int32": (with_tensor(Q0_A, GOOD[Q0_A].astype(np.int32)), "wrong_dtype"),
    "dtype is a list": (with_header(set_entry(Q0_A, dtype=["F32"])), "wrong_dtype"),
    "missing entry key": (with_header(lambda h: h[Q0_A].pop("shape")), "bad_header"),
    "extra entry key": (with_header(set_entry(Q0_A, strides=[1, 1])), "bad_header"),
    "one dimension": (with_header(set_entry(Q0_A, shape=[128])), "bad_shape"),
    "zero rows": (with_header(set_entry(Q0_A, shape=[0, 32])), "bad_shape"),
    "negative shape": (with_header(set_entry(Q0_A, shape=[-4, -32])), "bad_shape"),
    "float shape": (with_header(set_entry(Q0_A, shape=[4.0, 32])), "bad_shape"),
    "true for a size": (with_header(set_entry(Q0_A, shape=[True, 128])), "bad_shape"),
    "huge shape": (with_header(set_entry(Q0_A, shape=[1 << 62, 1 << 62])), "bad_shape"),
    "shape and bytes disagree": (with_header(set_entry(Q0_A, shape=[4, 31])), "bad_offsets"),
    "offsets backwards": (with_header(set_entry(Q0_A, data_offsets=[512, 0])), "bad_offsets"),
    "overlap": (with_header(overlapping), "overlapping_offsets"),
    "gap": (with_header(gap, data_of(GOOD) + b"\0" * 4), "offsets_gap"),
    "offsets past the end": (with_header(lambda h: None, data_of(GOOD)[:-512]), "truncated"),
    "A without B": (without(Q0_B), "missing_b"),
    "B without A": (without(Q0_A), "missing_a"),
    "no such layer": (renamed(Q0_A, Q0_A.replace("layers.0", "layers.9")), "unknown_module"),
    "no prefix": (renamed(Q0_A, Q0_A.removeprefix(PREFIX)), "unknown_tensor"),
    "whole weight": (with_tensor(f"{PREFIX}lm_head.weight", np.zeros((4, 4), np.float32)), "unsupported_full_weight"),
    "embedding": (renamed(Q0_A, f"{PREFIX}model.embed_tokens.lora_embedding_A"), "unsupported_embedding_lora"),
    "magnitude": (with_tensor(Q0_A.replace("lora_A", "lora_magnitude_vector"), GOOD[Q0_A]), "unsupported_dora"),
    "bias": (with_tensor(Q0_B.replace("weight", "bias"), GOOD[Q0_A]), "unsupported_bias"),
    "same tensor twice": (with_tensor(Q0_A.replace(".weight", ".default.weight"), GOOD[Q0_A]), "duplicate_tensor"),
    "layer not targeted": (
        safetensors_bytes(lora_tensors(BASE, ends=("q_proj", "v_proj", "o_proj"))),
        "untargeted_module",
    ),
    "target without tensors": (safetensors_bytes(lora_tensors(BASE, ends=("q_proj",))), "unmatched_target"),
    "rank is not the config's": (safetensors_bytes(lora_tensors(BASE, rank=5)), "rank_mismatch"),
    "B's rank differs from A's": (with_tensor(Q0_B, np.zeros((32, 5), np.float32)), "rank_mismatch"),
    "in_features": (with_tensor(Q0_A, np.zeros((4, 33), np.float32)), "wrong_shape"),
    "out_features": (with_tensor(Q0_B, np.zeros((31, 4), np.float32)), "wrong_shape"),
    "NaN": (with_value(float("nan")), "non_finite"),
    "infinity": (with_value(float("inf")), "non_finite"),
    "minus infinity in float16": (with_value(float("-inf"), np.float16), "non_finite"),
    "made for another base": (safetensors_bytes(GOOD, {"multilora_base_digest": "sha256:0"}), "wrong_base"),
}

BAD_CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "DoRA": ({"use_dora": True}, "missing_magnitude"),
    "bias": ({"bias": "lora_only"}, "unsupported_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "unsupported_modules_to_save"),
    "regex targets": ({"target_modules": "(a+)+$"}, "regex_targets"),
    "regex pattern": ({"rank_pattern": {"(a+)+$": 4}}, "regex_pattern"),
    "regex layers": ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "regex_pattern"),
    "unknown field": ({"new_meaning": {"x": 1}}, "unknown_field"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "base_altering_init"),
    "rank over the limit": ({"r": 257}, "rank_too_large"),
    "target that matches nothing": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "unmatched_target"),
    "layer left out": ({"layers_to_transform": [0]}, "untargeted_module"),
    "module excluded": ({"exclude_modules": ["v_proj"]}, "untargeted_module"),
    "made for another base": ({"multilora_base_digest": "sha256:0"}, "wrong_base"),
}


def everything_in(folder: Path, store: AdapterStore) -> tuple[object, ...]:
    """All files with their sizes, and all tables with their row counts."""
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))
    with store.database.read() as connection:
        counts = {name: connection.scalar(select(func.count()).select_from(t)) for name, t in metadata.tables.items()}
    return files, counts


Refuse = Callable[..., None]


@pytest.fixture
def refuse(store: AdapterStore, data_dir: Path, tmp_path: Path) -> Refuse:
    """refuse(weights, code, config=..., base=...): publishing fails with this code, quickly, and leaves no trace."""

    def check(weights: bytes | Path, code: str, *, config: bytes | None = None, base: BaseDescription = BASE) -> None:
        path = weights if isinstance(weights, Path) else write(tmp_path / "bad", weights)
        upload = {"tenant": "acme", "name": "bad", "config": config or config_bytes(), "weights": path, "base": base}
        before = everything_in(data_dir, store)

        def publish() -> None:
            with pytest.raises(AdapterRejected) as caught:
                store.publish(**upload)
            message = caught.value.message
            assert caught.value.code == code, message
            assert message.isascii()
            assert message.isprintable()
            assert len(message) < 1200

        assert quiet_s(publish) < 0.1
        assert everything_in(data_dir, store) == before

    return check


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case: str, refuse: Refuse) -> None:
    refuse(*BAD_WEIGHTS[case])


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case: str, refuse: Refuse) -> None:
    changes, code = BAD_CONFIGS[case]
    refuse(safetensors_bytes(GOOD), code, config=config_bytes(**changes))


OVERFLOWS = [("bfloat16", 3.4e38), ("float16", 65520.0), ("float16", -1e30)]


@pytest.mark.parametrize(("dtype", "value"), OVERFLOWS)
def test_a_value_that_overflows_the_bases_dtype_is_refused(dtype: str, value: float, refuse: Refuse) -> None:
    refuse(with_value(value), "cast_overflow", base=tiny_base(dtype=dtype))


def test_nan_is_refused_as_nan_whatever_the_base(refuse: Refuse) -> None:
    refuse(with_value(float("nan")), "non_finite", base=tiny_base(dtype="float16"))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65519.0), ("bfloat16", 3.38e38), ("float32", 3.4e38)])
def test_the_largest_value_that_fits_is_accepted(dtype: str, value: float, store: AdapterStore, tmp_path: Path) -> None:
    base = tiny_base(dtype=dtype)
    weights = write(tmp_path / "good", with_value(value))
    version = store.publish(tenant="acme", name="x", config=config_bytes(), weights=weights, base=base)
    assert torch.isfinite(store.load_packed(version.digest, base).buffer).all()


def test_an_adapter_without_tensors_for_a_random_init_is_refused(
    refuse: Refuse, store: AdapterStore, tmp_path: Path
) -> None:
    partial = safetensors_bytes({name: array for name, array in GOOD.items() if "layers.0" in name})
    refuse(partial, "missing_tensors", config=config_bytes(init_lora_weights=False))
    weights = write(tmp_path / "part", partial)
    assert store.publish(tenant="acme", name="x", config=config_bytes(), weights=weights, base=BASE).rank == 4


def test_a_sparse_terabyte_is_refused_at_once(refuse: Refuse, tmp_path: Path) -> None:
    path = write(tmp_path / "huge", safetensors_bytes(GOOD))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    refuse(path, "too_large")


def test_the_byte_limit_is_inclusive(data_dir: Path, tmp_path: Path) -> None:
    weights = write(tmp_path / "w", safetensors_bytes(GOOD))
    size = weights.stat().st_size
    for limit, accepted in ((size, True), (size - 1, False)):
        store = AdapterStore.open(data_dir / str(limit), limits=AdapterLimits(max_bytes=limit))
        store.tenants.create("acme")
        with contextlib.nullcontext() if accepted else pytest.raises(AdapterRejected, match=str(limit)):
            store.publish(tenant="acme", name="x", config=config_bytes(), weights=weights, base=BASE)
        store.close()


def test_what_is_no_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "missing_weights")
    refuse(tmp_path, "missing_weights")


def test_patterns_that_would_take_seconds_are_refused(refuse: Refuse) -> None:
    patterns = {f"{index:06d}_proj": 4 for index in range(8000)}
    q_proj = BASE.modules["model.layers.0.self_attn.q_proj"]
    modules = {f"model.layers.{layer}.self_attn.q_proj": q_proj for layer in range(200)}
    wide = BaseDescription(BASE.digest, "wide", BASE.architecture, BASE.dtype, modules)
    weights = safetensors_bytes(lora_tensors(wide, ends=("q_proj",), rank=1))
    config = config_bytes(target_modules=["q_proj"], r=1, rank_pattern=patterns)
    refuse(weights, "pattern_too_large", config=config, base=wide)


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "../x", ".hidden", "a b", "x" * 129, "a\n", "é"])
def test_bad_names_are_refused(name: str, store: AdapterStore, data_dir: Path, tmp_path: Path) -> None:
    before = everything_in(data_dir, store)
    weights = write(tmp_path / "w", safetensors_bytes(GOOD))
    with pytest.raises(InputRefused) as caught:
        store.publish(tenant="acme", name=name, config=config_bytes(), weights=weights, base=BASE)
    assert (caught.value.code, caught.value.param) == ("bad_name", "name")
    with pytest.raises(InputRefused):
        store.tenants.create(name)
    with pytest.raises(NotFound):
        store.resolve("acme", name)
    assert everything_in(data_dir, store) == before


def test_an_unknown_tenant_is_refused_before_anything_is_written(
    store: AdapterStore, data_dir: Path, tmp_path: Path
) -> None:
    before = everything_in(data_dir, store)
    weights = write(tmp_path / "w", safetensors_bytes(GOOD))
    with pytest.raises(NotFound) as caught:
        store.publish(tenant="nobody", name="x", config=config_bytes(), weights=weights, base=BASE)
    assert caught.value.code == "tenant_not_found"
    assert everything_in(data_dir, store) == before

"""A base's files hold exactly its architecture's tensors: for every family, every kind of tensor, plain and in NF4."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.files import describe_base
from adapters_store.base.token_weights import token_weight_sha256
from adapters_store.base.weights import load_causal
from support.models.models import FAMILY_NAMES, save_base

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_tensor_may_be_missing(tmp_path: Path, family: str) -> None:
    """The first of each kind: embedding, head, norms, biases, projections."""
    base = save_base(tmp_path / "base", family)
    whole = load_file(base / "model.safetensors")
    first_of_kind = {".".join(name.split(".")[-3:]): name for name in sorted(whole, reverse=True) if "layers.0" in name}
    outside = [name for name in whole if "layers" not in name]
    assert len(first_of_kind) >= 6
    for name in (*first_of_kind.values(), *outside):
        kept = {key: tensor for key, tensor in whole.items() if key != name}
        save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UnsupportedBase, match="are missing: ") as told:
            describe_base(base)
        assert name in str(told.value)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_tied_head_may_be_in_the_file_or_not(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", family)
    modules = describe_base(base).modules
    rewritten(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert describe_base(base).modules == modules
    load_causal(base, torch.float32, torch.device("cpu"))


def test_loading_refuses_what_describing_does(tmp_path: Path) -> None:
    """Both are asked: files may change between them."""
    base = save_base(tmp_path / "base", "llama")
    rewritten(base, lambda tensors: tensors.pop("model.norm.weight"))
    for look in (describe_base, lambda path: load_causal(path, torch.float32, torch.device("cpu"))):
        with pytest.raises(UnsupportedBase, match=r"are missing: model\.norm\.weight"):
            look(base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.absmax"), r"that NF4 needs are missing: .*\.absmax"),
        (lambda tensors, name: tensors.pop(f"{name}.nested_quant_map"), r"are missing: .*\.nested_quant_map"),
        (lambda tensors, name: tensors.pop(f"{name}.quant_state.bitsandbytes__nf4"), "stored as U8"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-8].clone()}), "bytes of NF4, which is not"),
        (lambda tensors, name: tensors.update({"x.weight": torch.ones(2)}), "not of this architecture: x.weight"),
    ],
)
def test_a_base_in_nf4_is_looked_at_as_closely(
    tmp_path: Path, change: Callable[[Tensors, str], object], words: str
) -> None:
    pytest.importorskip("bitsandbytes")
    from support.models.stored_nf4 import save_in_nf4

    plain = save_base(tmp_path / "plain", "llama")
    base = save_in_nf4(plain, tmp_path / "nf4", dtype=torch.float32, compute_dtype=torch.float32)
    assert describe_base(base).modules == describe_base(plain).modules
    rewritten(base, lambda tensors: change(tensors, "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UnsupportedBase, match=words):
        describe_base(base)


def test_token_weights_are_hashed_in_every_type_that_keeps_what_is_served(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    in_bf16, in_f32 = (describe_base(base, dtype=dtype) for dtype in ("bfloat16", "float32"))
    for name, cast in {"BF16": head.bfloat16(), "F32": head}.items():
        expected = hashlib.sha256(cast.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert token_weight_sha256(in_bf16, "lm_head", name) == expected
    assert token_weight_sha256(in_f32, "lm_head", "F32") == expected
    assert token_weight_sha256(in_f32, "lm_head", "BF16") is None


def test_a_token_weight_is_hashed_for_the_first_that_asks_while_the_base_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    described = BaseDescription.from_json(describe_base(save_base(tmp_path / "base", "qwen2")).to_json())
    known = tmp_path / "cache" / "multilora" / "base-digests.json"
    assert "token-weight" not in known.read_text()
    tied = token_weight_sha256(described, "lm_head", "F32")
    assert tied is not None
    assert tied == token_weight_sha256(described, "model.embed_tokens", "F32")
    assert known.read_text().count("token-weight") == 2
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert token_weight_sha256(described, "lm_head", "F32") is None

"""What may be a base, what its identity is, and that NF4 weights stay as they were loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM

from adapters_store.base.families import UnsupportedBase
from adapters_store.base.files import describe_base
from adapters_store.base.nf4 import keep_nf4_weights_plain
from server.engine.model.base_model import load_base, pick_device
from server.engine.model.norms import FusedRMSNorm
from support.models.models import FAMILY_NAMES, save_base
from support.models.packed_forward import PackedForward
from support.models.stored_nf4 import save_in_nf4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama") / "base", "llama")


def test_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 2, "vocab_size": 64, "word_embed_proj_dim": 32}
    OPTForCausalLM(OPTConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBase, match=r"OPTForCausalLM is not supported.*LlamaForCausalLM"):
        load_base(tmp_path)


@pytest.mark.parametrize("content", [None, "weights"])
def test_folder_that_holds_no_model_is_refused_with_what_is_missing(
    tmp_path: Path, llama: Path, content: str | None
) -> None:
    if content == "weights":
        (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    missing = "safetensors" if content == "weights" else "config.json"
    with pytest.raises(UnsupportedBase, match=missing):
        describe_base(tmp_path)


def test_digest_follows_weights_and_config_and_not_the_folder(tmp_path: Path) -> None:
    first = save_base(tmp_path / "a", "llama", seed=1)
    again = save_base(tmp_path / "b", "llama", seed=1)
    other = save_base(tmp_path / "c", "llama", seed=2)
    assert describe_base(first).digest == describe_base(again).digest
    assert describe_base(first).digest != describe_base(other).digest
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert describe_base(first).digest != describe_base(again).digest


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_linear_layer_is_in_exactly_one_group(tmp_path: Path, family: str) -> None:
    base = describe_base(save_base(tmp_path, family))
    grouped = [module for group in base.groups for module in group]
    assert grouped == list(base.modules)
    for group in base.groups:
        assert len({base.modules[module].in_features for module in group}) == 1
    assert type(base).from_json(base.to_json()) == base


def test_cuda_without_a_gpu_is_an_error_not_a_silent_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UnsupportedBase, match="--device cuda"):
        pick_device("cuda")


def test_norms_are_replaced_by_the_form_that_rounds_the_same_way(tmp_path: Path) -> None:
    for family, one_plus in (("llama", False), ("gemma3", True)):
        base = load_base(save_base(tmp_path / family, family), dtype="bfloat16")
        norms = [module for module in base.model.modules() if isinstance(module, FusedRMSNorm)]
        assert not [module for module in base.model.modules() if hasattr(module, "variance_epsilon")]
        assert {norm._one_plus for norm in norms} == {one_plus}


def test_gradients_after_an_eval_pass_are_those_of_a_fresh_nf4_model(tmp_path: Path) -> None:
    """bitsandbytes repacks NF4 weights in eval mode on some CPUs; gradients are then silently wrong."""
    path = save_base(tmp_path, "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    tokens = torch.arange(3, 35)[None]

    def gradient(eval_first: bool) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=quantization, local_files_only=True
        )
        keep_nf4_weights_plain(model)
        if eval_first:
            with torch.no_grad():
                model.eval()(tokens)
        embedding = model.train().get_input_embeddings().weight.requires_grad_(True)
        model(tokens, labels=tokens).loss.backward()
        return embedding.grad.float().flatten()

    fresh, after = gradient(False), gradient(True)
    assert torch.nn.functional.cosine_similarity(fresh, after, dim=0) > 0.9999


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_base_that_is_stored_in_nf4_is_what_quantising_it_here_gives(
    tmp_path: Path, llama: Path, quantize: str | None
) -> None:
    """Also where its config asks for another type to multiply in: the one it is served in counts."""
    stored = save_in_nf4(llama, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float16)
    logits = []
    for base in (
        load_base(llama, dtype="float32", quantize="nf4"),
        load_base(stored, dtype="float32", quantize=quantize),
    ):
        assert base.quantized
        forward = PackedForward(base, [], num_sequences=1)
        logits += forward.logits([forward.request(0, list(range(3, 100)), None)])
    assert torch.equal(*logits)


def test_a_base_that_is_stored_in_nf4_is_served_in_the_type_asked_for(tmp_path: Path, llama: Path) -> None:
    """transformers keeps what is not quantised, and the type to multiply in, as stored."""
    stored = save_in_nf4(llama, tmp_path / "stored", dtype=torch.bfloat16, compute_dtype=torch.float16)
    logits = []
    for dtype, torch_dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        base = load_base(stored, dtype=dtype)
        assert {tensor.dtype for tensor in base.model.parameters() if tensor.is_floating_point()} <= {torch_dtype}
        forward = PackedForward(base, [], num_sequences=1)
        logits += forward.logits([forward.request(0, list(range(3, 100)), None)])
    assert (logits[0] - logits[1]).abs().max() <= 0.05 * logits[1].abs().max()


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
        ({"bits": 4}, "an unnamed form"),
    ],
)
def test_a_base_that_is_stored_in_another_form_is_refused_by_its_name(
    tmp_path: Path, llama: Path, stored: dict[str, object], named: str
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(UnsupportedBase, match=rf"stored as {named}; served are unquantised ones and bitsandbytes nf4"):
        load_base(tmp_path)

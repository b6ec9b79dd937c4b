"""How a base is loaded in 4 bits, in the server as in the trainer. Knows bitsandbytes' options and its two traps."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from adapters_store.base.families import UnsupportedBase


def is_stored_in_nf4(config: PretrainedConfig) -> bool:
    """Whether the base's own files hold NF4 weights, as bitsandbytes saves them. UnsupportedBase for any other form."""
    stored = config.to_dict().get("quantization_config")
    if not stored:
        return False
    form = str(stored.get("quant_method", "an unnamed form"))
    if form == "bitsandbytes":
        form += f" {stored.get('bnb_4bit_quant_type', 'fp4')}" if stored.get("load_in_4bit") else " int8"
    if form != "bitsandbytes nf4":
        raise UnsupportedBase(
            f"the base's weights are stored as {form}; served are unquantised ones and bitsandbytes nf4"
        )
    _need_bitsandbytes()
    return True


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314). Raises UnsupportedBase without bitsandbytes."""
    _need_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _need_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedBase("NF4 needs bitsandbytes, which is not installed: pip install 'multilora[nf4]'")


def turn_stored_nf4_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Multiply in `dtype`, and hold in it what is not quantised. A base that is stored in NF4 brings its own types for
    both, and transformers keeps them whatever is asked for."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def make_linears_4bit(model: torch.nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers, which multiply in `dtype`, in the place of linear ones. They have no weights yet."""
    from bitsandbytes.nn import Linear4bit

    for name in names:
        linear: Any = model.get_submodule(name)
        outs, inputs = linear.weight.T.shape if isinstance(linear, Conv1D) else linear.weight.shape
        layer = Linear4bit(
            inputs,
            outs,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        model.set_submodule(name, layer.to(dtype).requires_grad_(False))


def packed_in_nf4(
    packed: torch.Tensor, about: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, Any]:
    """What a base's files hold as `packed` and, under its name and a dot, what is `about` it: bytes, and QuantState."""
    from bitsandbytes.functional import QuantState

    return packed.to(device), QuantState.from_dict(dict(about), device=device)


def dequantized(packed: torch.Tensor, about: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The [O, H] weight of the same."""
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(*packed_in_nf4(packed, about, packed.device))
    return weight


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The weight as `nf4_config` leaves it: bytes [O * H / 2, 1], and bitsandbytes' QuantState."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return packed, state


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """The same, dequantised."""
    from bitsandbytes.functional import dequantize_4bit

    rounded: torch.Tensor = dequantize_4bit(*quantized(weight))
    return rounded


def absmaxes(state: Any) -> torch.Tensor:
    """Of every block, in float32, as bitsandbytes computes them from a QuantState before it dequantises."""
    from bitsandbytes.functional import dequantize_blockwise

    outer: torch.Tensor = state.absmax
    if state.nested:
        outer = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return outer.float()


def keep_nf4_weights_plain(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 weights in place on CPUs with AVX512-BF16.

    It does so at the first forward in eval mode, and gradients taken later are silently wrong (cosine 0.38 measured).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no attribute that torch declares)

"""How a base is loaded in 4 bits, in the server as in the trainer. Knows bitsandbytes' options and its one trap."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from adapters_store.families import UnsupportedBase


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314). Raises UnsupportedBase without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedBase("NF4 needs bitsandbytes, which is not installed: pip install 'multilora[nf4]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_nf4_weights_plain(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 weights in place on CPUs with AVX512-BF16.

    It does so at the first forward in eval mode, and gradients taken later are silently wrong (cosine 0.38 measured).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no attribute that torch declares)

"""A base as the Hub's `*-bnb-4bit` repositories hold it: quantised by bitsandbytes, then saved."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters_store.base.nf4 import keep_nf4_weights_plain


def save_in_nf4(base: Path, folder: Path, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> Path:
    """The base's weights of `dtype` in NF4 with double quantisation. compute_dtype: what its config asks for."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=config, local_files_only=True, device_map={"": "cpu"}
    )
    keep_nf4_weights_plain(model)
    model.save_pretrained(folder)
    return folder

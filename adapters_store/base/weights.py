"""Loads a base's weights, plain or in NF4: for server, trainer and their checks. Knows transformers' options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.files import load_config
from adapters_store.base.folder import reading, weight_files
from adapters_store.base.nf4 import is_stored_in_nf4, keep_nf4_weights_plain, nf4_config, turn_stored_nf4_to
from adapters_store.base.tensors import model_class, refuse_differences


def load_causal(path: Path, dtype: torch.dtype, device: torch.device, *, nf4: bool = False, **options: Any) -> Any:
    """transformers' model of a local folder in `dtype` on `device`, its linear layers in 4 bits with `nf4`.

    A base that is stored in NF4 is taken as it is. options: of `from_pretrained`. Raises UnsupportedBase, also if
    the files do not hold exactly the architecture's tensors.
    """
    config = load_config(path)
    stored_nf4 = is_stored_in_nf4(config)
    weight_files(path)
    if nf4 and not stored_nf4:
        options["quantization_config"] = nf4_config(dtype)
    is_placed = nf4 or stored_nf4 or device.type == "cuda"
    with reading(path, "the weights"):
        model, info = model_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            device_map={"": str(device)} if is_placed else None,
            output_loading_info=True,
            **options,
        )
    return checked(path, model, info, dtype if stored_nf4 else None)


def checked(path: Path, model: Any, info: Mapping[str, Any], dtype_of_nf4: torch.dtype | None) -> Any:
    """The model that transformers has loaded, its NF4 weights as they are used here. info: of `from_pretrained`.
    dtype_of_nf4: in which a base that is stored in NF4 is to multiply; None: it is not stored so.

    Raises UnsupportedBase if the files do not hold exactly the architecture's tensors."""
    refuse_differences(path, info)
    keep_nf4_weights_plain(model)
    if dtype_of_nf4 is not None:
        turn_stored_nf4_to(model, dtype_of_nf4)
    return model

"""Whether a base's files hold the tensors of its architecture: all, no others, in their shapes. Reads headers only.

transformers itself judges, on tensors without memory: it knows what an architecture ties, ignores or renames.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from adapters_store.base.families import UnsupportedBase, family_of
from adapters_store.base.folder import reading
from adapters_store.base.nf4 import is_stored_in_nf4

WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
NF4_MARK = ".quant_state.bitsandbytes__nf4"  # JSON as bytes, under the name of the weight it is about
_NAMES_SHOWN = 3
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads")
_MAX_SIZE = 2**24  # of one dimension; the largest vocabularies have 2**18


def model_class(config: PretrainedConfig) -> Any:
    """transformers' own class of the config's architecture. Raises UnsupportedBase."""
    return own_class(config.architectures, config.model_type)


def own_class(architectures: object, model_type: object, *, own_code: object = None) -> Any:
    """The same from what config.json says. own_code: its `auto_map`. UnsupportedBase also if the two disagree."""
    architecture = family_of(architectures, own_code=own_code).architecture
    found: Any = getattr(transformers, architecture)
    wanted = found.config_class.model_type
    if model_type != wanted:
        raise UnsupportedBase(f"config.json: {architecture} has model_type {wanted!r}, got {model_type!r:.60}")
    return found


def checked_skeleton(folder: Path, config: PretrainedConfig, files: Iterable[Path]) -> Any:
    """The base's model without memory, its layers unquantised. files: of the folder, with all its tensors.

    Raises UnsupportedBase that names tensors which are missing, unknown or of another shape or type.
    """
    with reading(folder, "the weights"):
        tensors = dict(_tensors(folder, files))
    _refuse_sizes(folder, config, tensors)
    plain = config
    if is_stored_in_nf4(config):
        plain = copy.deepcopy(config)
        del plain.quantization_config
    with reading(folder, "config.json"), _silence():
        skeleton, info = model_class(config).from_pretrained(
            None,
            config=plain,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    refuse_differences(folder, info)
    return skeleton


def _refuse_sizes(folder: Path, config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Sizes that no base has: transformers would fill memory with tables for them, or build layers without end."""
    limits = {**dict.fromkeys(_SIZES, _MAX_SIZE), "num_hidden_layers": len(tensors)}
    for field, limit in limits.items():
        value = getattr(config, field, None)
        if isinstance(value, int) and value > limit:
            found = f"{field} is {str(value)[:20]}, at most {limit} is possible with these files"
            raise UnsupportedBase(f"--base {folder}: config.json: {found}")


def refuse_differences(folder: Path, info: Mapping[str, Any]) -> None:
    """info: `from_pretrained`'s report on the tensors. Raises UnsupportedBase unless all were loaded."""
    missing, unexpected, mismatched = (info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shapes = [f"{name} is {list(stored)}, not {list(wanted)}" for name, stored, wanted in mismatched]
    found = [
        *_listed(missing, "that the architecture needs are missing"),
        *_listed(unexpected, "are not of this architecture"),
        *_listed(shapes, "have another shape than config.json says"),
        *info["error_msgs"],
    ]
    if found:
        raise UnsupportedBase(f"--base {folder}: {'; '.join(found)}")


def _listed(names: Iterable[str], what: str) -> list[str]:
    shown = sorted(names)
    more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    return [f"tensors {what}: {', '.join(shown[:_NAMES_SHOWN])}{more}"] if shown else []


def _tensors(folder: Path, files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files as one without memory; an NF4 tensor as the plain weight that it encodes."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            packed = {name.removesuffix(NF4_MARK) for name in names if name.endswith(NF4_MARK)}
            for name in names:
                if name in packed:
                    yield name, torch.empty(_plain_shape(folder, stored, name), device="meta")
                elif packed.isdisjoint(_owners(name)):
                    slice_ = stored.get_slice(name)
                    _refuse_dtype(folder, name, slice_.get_dtype())
                    yield name, torch.empty(slice_.get_shape(), device="meta")


def _plain_shape(folder: Path, stored: Any, name: str) -> list[int]:
    """Of the weight that is stored in NF4 as `name`. UnsupportedBase if its bytes or their metadata are missing."""
    about = json.loads(bytes(stored.get_tensor(name + NF4_MARK).tolist()))
    needed = ["absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if "nested_blocksize" in about else ())]
    lacking = [f"{name}.{part}" for part in needed if f"{name}.{part}" not in set(stored.keys())]
    if lacking:
        raise UnsupportedBase(f"--base {folder}: {_listed(lacking, 'that NF4 needs are missing')[0]}")
    shape: list[int] = about["shape"]
    num_bytes = math.prod(stored.get_slice(name).get_shape())
    if num_bytes != -(-math.prod(shape) // 2):
        raise UnsupportedBase(f"--base {folder}: {name} has {num_bytes} bytes of NF4, which is not {shape}")
    return shape


def _owners(name: str) -> Iterator[str]:
    """The weight that a tensor of NF4's own may be about: "w.quant_map" and "w.quant_state.x" are about "w"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _refuse_dtype(folder: Path, name: str, dtype: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise UnsupportedBase(f"--base {folder}: {name} is stored as {dtype}; served are {', '.join(WEIGHT_DTYPES)}")


@contextmanager
def _silence() -> Iterator[None]:
    """No report and no bar from transformers: its findings become one refusal."""
    before, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if had_bar:
            transformers_logging.enable_progress_bar()

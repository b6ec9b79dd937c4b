"""The base on disk: its identity and its layers, read without loading a weight. Knows files and configs; no devices."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from adapters_store.base.description import BaseDescription, ExpertsShape, LinearShape
from adapters_store.base.digests import base_digest
from adapters_store.base.families import Family, UnsupportedBase, family_of
from adapters_store.base.folder import CONFIG, read_config, reading, refuse_pointers, weight_files
from adapters_store.base.nf4 import is_stored_in_nf4
from adapters_store.base.tensors import checked_skeleton, model_class, own_class

CODE_KEYS = ("auto_map", "custom_pipelines", "fusion_config")
OUTPUT_FLAGS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # of a forward
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(path: Path) -> PretrainedConfig:
    """The base's config, free of all that would let the folder choose code. Raises UnsupportedBase."""
    body = read_config(path)
    refuse_pointers(path)
    own_class(body.get("architectures"), body.get("model_type"), own_code=body.get("auto_map"))
    if body.get("transformers_weights") is not None:
        raise UnsupportedBase(f"--base {path}: {CONFIG} sets transformers_weights; only model.safetensors is read")
    with reading(path, CONFIG):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = None  # a name here can mean code that is fetched
        for name in CODE_KEYS:
            vars(config).pop(name, None)
        for name, value in OUTPUT_FLAGS.items():
            setattr(config, name, value)
    model_class(config)  # transformers may have read it as another type
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedBase(
            f"--base {path}: {CONFIG} sets use_bidirectional_attention: it embeds texts, and writes none"
        )
    return config


def served_dtype(config: PretrainedConfig, wanted: str) -> torch.dtype:
    """`auto` takes the base's own type; float16 becomes bfloat16, which holds its range."""
    if wanted != "auto":
        return DTYPES[wanted]
    own = getattr(config, "dtype", None) or torch.float32
    return torch.bfloat16 if own is torch.float16 else own


def describe_base(path: Path, *, dtype: str = "auto", name: str | None = None) -> BaseDescription:
    """Modules, groups and digest of the base in a local folder.

    Raises UnsupportedBase for an architecture, a stored form or a layer layout that we do not serve, and for files that
    do not hold exactly the architecture's tensors.
    """
    config = load_config(path)
    is_stored_in_nf4(config)  # other stored forms are refused
    family = family_of(config.architectures)
    files = weight_files(path)
    skeleton = checked_skeleton(path, config, files)
    parameters = dict(skeleton.named_parameters())
    groups = tuple(
        group
        for group in family.groups(config.num_hidden_layers)
        if not family.is_router(group[0]) or f"{group[0]}.weight" in parameters
    )
    modules = {module: _shape_of(skeleton, module, family) for group in groups for module in group}
    stacks = (name for name in family.expert_stacks(config.num_hidden_layers) if name in parameters)
    return BaseDescription(
        digest=base_digest(path),
        name=name or path.resolve().name,
        architecture=family.architecture,
        dtype=str(served_dtype(config, dtype)).removeprefix("torch."),
        modules=modules,
        groups=groups,
        folder=str(path.resolve()),
        experts={name: _experts_of(name, parameters[name]) for name in stacks},
    )


def _experts_of(name: str, parameter: torch.nn.Parameter) -> ExpertsShape:
    if parameter.dim() != 3:
        raise UnsupportedBase(f"{name} has {parameter.dim()} dimensions, not experts x outputs x inputs")
    num_experts, out_features, in_features = parameter.shape
    return ExpertsShape(num_experts, in_features, out_features)


def _shape_of(skeleton: torch.nn.Module, module: str, family: Family) -> LinearShape:
    try:
        layer = skeleton.get_submodule(module)
    except AttributeError as error:
        raise UnsupportedBase(f"the base has no module {module}, which its architecture should have") from error
    if family.is_router(module):
        out_features, in_features = layer.get_parameter("weight").shape
        return LinearShape(in_features, out_features)
    if isinstance(layer, Conv1D):
        return LinearShape(layer.nx, layer.nf)
    if not isinstance(layer, torch.nn.Linear):
        raise UnsupportedBase(f"{module} is a {type(layer).__name__}, not a linear layer")
    return LinearShape(layer.in_features, layer.out_features)

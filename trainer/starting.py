"""The adapter that a run continues from: what it must be, and the spec's fields that follow from it. No tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapters_store.format.chat_fields import DIALECT_FIELD, DTYPE_FIELD, TEMPLATE_FIELD
from adapters_store.parsing.adapter_files import CONFIG_FILE
from trainer.spec import AdapterSpec, SpecError, TrainSpec

FIELD = "initial_adapter"
_CHANGE_THE_ADAPTER = (  # fields of PEFT's config that must be absent or false
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "exclude_modules",
)
_PLAIN = "a plain LoRA adapter in PEFT's format"


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a spec that an adapter's config decides: `adapter`, and its own dialect and chat template.

    Raises SpecError for an adapter that is more than LoRA on named layers.
    """
    if not isinstance(config, Mapping):
        raise SpecError(FIELD, config, _PLAIN)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise SpecError(FIELD, {key: config.get(key) for key in ("peft_type", "bias")}, _PLAIN)
    changed = next((key for key in _CHANGE_THE_ADAPTER if config.get(key)), None)
    if changed is not None:
        raise SpecError(FIELD, {changed: config[changed]}, f"{_PLAIN}, without {changed}")
    targets = config.get("target_modules")
    adapter = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": sorted(targets, key=str) if isinstance(targets, list) else targets,  # PEFT writes a set
        "rslora": bool(config.get("use_rslora", False)),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
    own = {
        "tool_dialect": config.get(DIALECT_FIELD),
        "chat_template": config.get(TEMPLATE_FIELD),
        "adapter_dtype": config.get(DTYPE_FIELD),
    }
    return {"adapter": adapter, **{key: value for key, value in own.items() if value is not None}}


def filled_in(spec: TrainSpec) -> TrainSpec:
    """The spec with its starting adapter's fields, if there is one. Raises SpecError for an `adapter` section that says
    otherwise, and for a folder that holds no such adapter."""
    if spec.initial_adapter is None:
        return spec
    try:
        config = json.loads((spec.initial_adapter / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        raise SpecError(FIELD, str(spec.initial_adapter), f"a folder with {_PLAIN}") from None
    found = fields_of(config)
    adapter = AdapterSpec.model_validate({**found["adapter"], "dropout": spec.adapter.dropout})
    if _sorted(spec.adapter) not in (adapter, AdapterSpec(dropout=spec.adapter.dropout)):
        raise SpecError("adapter", spec.adapter.model_dump(), f"absent, or as {FIELD} has it: {found['adapter']}")
    own = {key: getattr(spec, key) or found.get(key) for key in ("tool_dialect", "chat_template", "adapter_dtype")}
    return TrainSpec.model_validate({**spec.model_dump(), "adapter": adapter, **own})


def _sorted(adapter: AdapterSpec) -> AdapterSpec:
    targets = adapter.target_modules
    return (
        adapter if isinstance(targets, str) else adapter.model_copy(update={"target_modules": tuple(sorted(targets))})
    )

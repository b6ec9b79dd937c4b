"""Every field PEFT 0.21 writes into a LoRA adapter_config.json, and what we do with it. Knows no modules, no tensors.

A field is one of four: read by us (config.py), free (it cannot change what the adapter computes; only its type is
checked), refused unless at its neutral value, or unknown (refused unless null, false or empty, or a text that was
added to a file of a PEFT that knows no such field).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapters_store.errors import AdapterRejected
from adapters_store.parsing.adapter_files import refuse_foreign_keys
from adapters_store.parsing.strict_json import shown

Body = Mapping[str, object]

READ_FIELDS = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "alora_invocation_tokens",
        "modules_to_save",
        "target_parameters",
        "multilora_adapter_dtype",
        "multilora_base_digest",
        "multilora_chat_template",
        "multilora_tool_dialect",
    }
)

_OBJECT = (dict, type(None))
_TEXT = (str, type(None))
FREE_FIELDS: Mapping[str, tuple[type, ...]] = {
    "auto_mapping": _OBJECT,
    "base_model_name_or_path": _TEXT,
    "corda_config": _OBJECT,
    "eva_config": _OBJECT,
    "fan_in_fan_out": (bool, type(None)),  # how PEFT stores a merged weight
    "inference_mode": (bool,),
    "lora_dropout": (int, float),
    "lora_ga_config": _OBJECT,
    "megatron_core": _TEXT,
    "peft_version": _TEXT,
    "qalora_group_size": (int,),
    "revision": _TEXT,
    "runtime_config": _OBJECT,
}

# Field -> its code and its neutral values. An empty object is not neutral for most: PEFT reads "use_bdlora": {} as
# that variant with its defaults.
_OFF: tuple[object, ...] = (None, False)
_ABSENT: tuple[object, ...] = (None,)
_NO_LIST: tuple[object, ...] = (None, [])
_NO_OBJECT: tuple[object, ...] = (None, {})
UNSUPPORTED_FIELDS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "arrow_config": ("unsupported_arrow", _ABSENT),
    "ensure_weight_tying": ("unsupported_weight_tying", _OFF),
    "kasa_config": ("unsupported_kasa", _ABSENT),
    "layer_replication": ("unsupported_layer_replication", _NO_LIST),
    "loftq_config": ("base_altering_init", _NO_OBJECT),
    "lora_bias": ("unsupported_bias", _OFF),
    "megatron_config": ("unsupported_megatron", _NO_OBJECT),
    "monteclora_config": ("unsupported_monteclora", _ABSENT),
    "trainable_token_indices": ("unsupported_trainable_tokens", _ABSENT),
    "use_bdlora": ("unsupported_bdlora", _ABSENT),
    "use_qalora": ("unsupported_qalora", _OFF),
    "velora_config": ("unsupported_velora", _ABSENT),
}

_MERGE = "; merge the adapter into its base with PEFT (merge_and_unload) and serve the result as a base"
_WAYS_OUT: Mapping[str, str] = {"lora_bias": _MERGE, "trainable_token_indices": _MERGE}

# Fields with one neutral value that is not empty.
FIXED_FIELDS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), "unsupported_peft_type"),
    "bias": (("none",), "unsupported_bias"),
    "task_type": (("CAUSAL_LM", None), "unsupported_task_type"),
}

KNOWN_PEFT = (0, 21)  # the newest whose fields are all in these tables
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?!\d)")

_DEFAULT_ZERO_DELTA = frozenset({"gaussian", "eva", "mica"})
_DEFAULT_OTHER_DELTA = frozenset({"orthogonal"})
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_fields(body: Body) -> None:
    """Refuse every meaning we do not serve.

    Raises:
        AdapterRejected: missing_field, bad_field, unknown_field, unsupported_format, or the code of the unsupported
            feature.
    """
    if "peft_type" not in body:
        refuse_foreign_keys(body)
        message = "adapter_config.json: peft_type is missing, so PEFT did not write it; send what save_pretrained saved"
        raise AdapterRejected("missing_field", message, param="peft_type")
    _check_field("peft_type", body["peft_type"])  # first: another method has other fields
    for field in ("r", "lora_alpha", "target_modules"):
        if field not in body:
            raise AdapterRejected("missing_field", f"adapter_config.json: {field} is missing", param=field)
    notes = _may_hold_notes(body)
    for field, value in body.items():
        _check_field(field, value, notes=notes)
    dropout = body.get("lora_dropout", 0)
    if isinstance(dropout, (int, float)) and not 0 <= dropout <= 1:
        raise bad_field("lora_dropout", dropout, "a number from 0 to 1")


def _may_hold_notes(body: Body) -> bool:
    """Whether texts under unknown names are notes that a person added (`"task": "summaries"`): PEFT ignores them.

    A later PEFT may mean something by its own new fields, and says so by its version, which it writes since 0.18.
    """
    version = _VERSION.match(str(body.get("peft_version") or "0.0"))
    return version is not None and (int(version[1]), int(version[2])) <= KNOWN_PEFT


def _check_field(field: str, value: object, *, notes: bool = False) -> None:
    if field in READ_FIELDS:
        return
    if field in FREE_FIELDS:
        _check_free(field, value)
    elif field in FIXED_FIELDS:
        allowed, code = FIXED_FIELDS[field]
        if value not in allowed or isinstance(value, bool):
            wanted = " or ".join(map(repr, allowed))
            raise AdapterRejected(code, f"{field}: only {wanted} is served, got {shown(value)}", param=field)
    elif field in UNSUPPORTED_FIELDS:
        code, neutral = UNSUPPORTED_FIELDS[field]
        if not any(type(value) is type(one) and value == one for one in neutral):
            way_out = _WAYS_OUT.get(field, "")
            raise AdapterRejected(code, f"{field}: is not supported, got {shown(value)}{way_out}", param=field)
    elif not is_empty(value) and not (notes and _is_note(field, value)):
        message = f"{shown(field)}: is unknown and may change the adapter's meaning, got {shown(value)}"
        raise AdapterRejected("unknown_field", message, param=field if field.isidentifier() else None)


def _is_note(field: str, value: object) -> bool:
    is_name = field.isidentifier() and field.isascii() and not field.startswith("multilora_")
    return is_name and isinstance(value, str)


def _check_free(field: str, value: object) -> None:
    types = FREE_FIELDS[field]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise bad_field(field, value, " or ".join("null" if kind is type(None) else kind.__name__ for kind in types))


def default_delta_is_zero(body: Body) -> bool:
    """Whether PEFT would leave a targeted module without tensors at a zero delta, by `init_lora_weights`.

    Raises:
        AdapterRejected: base_altering_init (PiSSA and the like: the adapter fits an altered base), bad_field.
    """
    init = body.get("init_lora_weights", True)
    if isinstance(init, bool):
        return init
    if isinstance(init, str):
        if init.lower().startswith(_ALTERS_BASE):
            message = f"init_lora_weights: {shown(init)} alters the base's weights; save the adapter converted to LoRA"
            raise AdapterRejected("base_altering_init", message, param="init_lora_weights")
        if init in _DEFAULT_ZERO_DELTA | _DEFAULT_OTHER_DELTA:
            return init in _DEFAULT_ZERO_DELTA
    raise bad_field("init_lora_weights", init, "true, false, 'gaussian', 'eva', 'orthogonal' or 'mica'")


def is_empty(value: object) -> bool:
    """null, false, "", [] or {}: what PEFT takes for "not used"."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def bad_field(field: str, value: object, wanted: str) -> AdapterRejected:
    """The error for a field we read whose value is not of its kind."""
    return AdapterRejected("bad_field", f"{field}: must be {wanted}, got {shown(value)}", param=field)

"""Reads adapter_config.json and says, for a module path: targeted or not, which rank, which scale.

Knows PEFT's LoRA meaning (0.21) exactly; knows no tensors and no base. Regular expressions run in linear time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from adapters_store.base.families import FAMILIES, HEAD
from adapters_store.errors import AdapterRejected
from adapters_store.format.chat_fields import dialect_in, is_int8_in, template_in
from adapters_store.format.config_fields import Body, bad_field, check_fields, default_delta_is_zero, is_empty
from adapters_store.format.limits import AdapterLimits
from adapters_store.parsing.adapter_files import CONFIG_FILE, refuse_lfs_pointer
from adapters_store.parsing.patterns import PATTERN_KEY, ModulePattern, SuffixPatterns, suffixes_at_dots
from adapters_store.parsing.strict_json import parse_strict_json, shown

MAX_ENTRIES = 8192  # target_modules, exclude_modules, layers_to_transform and each pattern
MAX_LAYERS_PATTERNS = 16
MAX_INVOCATION_TOKENS = 256
_MAX_ALPHA = 1e6
SAVED_WHOLE = frozenset(suffix for family in FAMILIES.values() for suffix in suffixes_at_dots(family.embedding)) | {
    HEAD
}
_MAX_OBJECTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What an adapter_config.json means. Fields are named as in peft.LoraConfig.

    target_modules: the entries as written, or one regular expression; None where the file says "all-linear" (the
        tensors tell which). A regular expression that is not decided targets what has tensors, and excludes nothing.
    zero_by_default: whether a targeted module without tensors has a zero delta in PEFT.
    base_digest: the base the adapter says it was made for, if it says so.
    alora_invocation_tokens: an activated LoRA changes nothing before the last place of these tokens in the prompt.
        None: an ordinary one, which changes all.
    modules_to_save: names of modules whose weights are in the file whole.
    target_parameters: ends of paths of parameters, see `experts.targets`.
    text_prefix: where the base's text model lay in the model of text and pictures that the adapter was trained on, and
        where it lies by itself. The config means the former's paths. None: it was trained on the base as it is.
    tool_dialect, chat_template: how its chats are written, where that differs from the base.
    use_dora: every targeted layer has a magnitude for each of its outputs.
    is_int8: its linear layers are kept and served as bytes.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: SuffixPatterns[int]
    alpha_pattern: SuffixPatterns[float]
    target_modules: frozenset[str] | ModulePattern | None
    exclude_modules: frozenset[str] | ModulePattern
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    zero_by_default: bool
    base_digest: str | None
    alora_invocation_tokens: tuple[int, ...] | None = None
    modules_to_save: frozenset[str] = frozenset()
    target_parameters: frozenset[str] = frozenset()
    text_prefix: tuple[str, str] | None = None
    tool_dialect: str | None = None
    chat_template: str | None = None
    use_dora: bool = False
    is_int8: bool = False

    def rank_of(self, module: str, *, times: int = 1) -> int:
        """The rank PEFT gives this module. times: layers that it joins there, which multiply what no pattern says."""
        return self.rank_pattern.find(self._as_trained(module), self.r * times)

    def scale_of(self, module: str, *, times: int = 1) -> float:
        """PEFT's `scaling`: alpha / rank, or alpha / sqrt(rank) with rsLoRA, in the same float arithmetic."""
        rank = self.rank_of(module, times=times)
        alpha = self.alpha_pattern.find(self._as_trained(module), self.lora_alpha * times)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def entries_matching(self, module: str) -> list[str]:
        """The entries of a target_modules list that PEFT would match with this module; [] if it is not targeted."""
        module = self._as_trained(module)
        if not isinstance(self.target_modules, frozenset) or self._excludes(module):
            return []
        if module in self.target_modules:
            return [module]  # PEFT asks for no layer index if an entry is the whole name
        if not self._layer_is_chosen(module):
            return []
        return [suffix for suffix in suffixes_at_dots(module) if suffix in self.target_modules]

    def targets(self, module: str) -> bool:
        """Whether PEFT would put this adapter on the module. For "all-linear" only exclusions speak against it."""
        if not isinstance(self.target_modules, frozenset):
            path = self._as_trained(module)
            is_matched = self.target_modules is None or self.target_modules.matches(path) is not False
            return is_matched and not self._excludes(path)
        return bool(self.entries_matching(module))

    def _as_trained(self, module: str) -> str:
        if self.text_prefix is None or not module.startswith(self.text_prefix[1]):
            return module
        outer, own = self.text_prefix
        return outer + module[len(own) :]

    @property
    def excludes_by_what_is_known(self) -> bool:
        """False if exclude_modules is a regular expression that is not decided."""
        return isinstance(self.exclude_modules, frozenset) or self.exclude_modules.is_decided

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude_modules, ModulePattern):
            return self.exclude_modules.matches(module) is True
        return any(suffix in self.exclude_modules for suffix in suffixes_at_dots(module))

    def _layer_is_chosen(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        return layer_index(module, self.layers_pattern) in self.layers_to_transform


def layer_index(module: str, layers_pattern: tuple[str, ...]) -> int | None:
    """The module's first layer number as PEFT finds it: "model.layers.3.mlp.up_proj" -> 3."""
    parts = module.split(".")
    numbered = [index for index in range(1, len(parts) - 1) if parts[index].isdecimal()]
    if not layers_pattern:
        return next((int(parts[index]) for index in numbered if index >= 2), None)
    for pattern in layers_pattern:
        for index in numbered:
            if parts[index - 1] == pattern:
                return int(parts[index])
    return None


def parse_config(data: bytes, limits: AdapterLimits) -> LoraConfig:
    """Read the bytes of an adapter_config.json.

    Raises:
        AdapterRejected: config_too_large, git_lfs_pointer, a code of strict_json or config_fields, regex_pattern.
    """
    if len(data) > limits.max_config_bytes:
        message = f"adapter_config.json: {len(data)} bytes, the limit is {limits.max_config_bytes}"
        raise AdapterRejected("config_too_large", message, param="config")
    refuse_lfs_pointer(data, "config", CONFIG_FILE)
    body = parse_strict_json(
        data,
        what=CONFIG_FILE,
        max_objects=_MAX_OBJECTS,
        refused=partial(AdapterRejected, param=CONFIG_FILE),
    )
    if not isinstance(body, dict):
        raise AdapterRejected("bad_json", f"adapter_config.json: must be an object, got {shown(body)}", param="config")
    check_fields(body)
    parameters = _target_parameters(body)
    targets = _targets(body, may_be_none=bool(parameters))
    by_list = isinstance(targets, frozenset)
    layers = _layers(body, by_list=by_list)
    return LoraConfig(
        r=_integer("r", body["r"]),
        lora_alpha=_alpha("lora_alpha", body["lora_alpha"]),
        use_rslora=_boolean("use_rslora", body.get("use_rslora", False)),
        rank_pattern=SuffixPatterns([(key, _integer("rank_pattern", v)) for key, v in _pattern("rank_pattern", body)]),
        alpha_pattern=SuffixPatterns([(key, _alpha("alpha_pattern", v)) for key, v in _pattern("alpha_pattern", body)]),
        target_modules=targets,
        exclude_modules=_names("exclude_modules", body.get("exclude_modules")),
        layers_to_transform=layers,
        layers_pattern=_layers_pattern(body, by_list=by_list),
        zero_by_default=default_delta_is_zero(body),
        base_digest=_optional_text("multilora_base_digest", body.get("multilora_base_digest")),
        alora_invocation_tokens=_invocation_tokens(body),
        modules_to_save=_modules_to_save(body),
        target_parameters=parameters,
        tool_dialect=dialect_in(body),
        chat_template=template_in(body),
        use_dora=_use_dora(body),
        is_int8=is_int8_in(body),
    )


def _integer(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
        raise bad_field(field, value, f"a whole number from 1 to {1 << 20}")
    return value


def _alpha(field: str, value: object) -> float:
    # An int stays an int: PEFT divides what it read, and int / int may round otherwise than float / int.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MAX_ALPHA:
        raise bad_field(field, value, f"a number from -{_MAX_ALPHA:g} to {_MAX_ALPHA:g}")
    return value


def _boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise bad_field(field, value, "true or false")
    return value


def _use_dora(body: Body) -> bool:
    value = body.get("use_dora")
    if value is not None and not isinstance(value, bool):
        raise AdapterRejected(
            "unsupported_dora", f"use_dora: must be true or false, got {shown(value)}", param="use_dora"
        )
    if value and body.get("alora_invocation_tokens") is not None:
        message = "use_dora: an activated LoRA with magnitudes is not served; train it without one of the two"
        raise AdapterRejected("unsupported_dora", message, param="use_dora")
    return bool(value)


def _optional_text(field: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise bad_field(field, value, "text")
    return value


def _invocation_tokens(body: Body) -> tuple[int, ...] | None:
    field = "alora_invocation_tokens"
    value = body.get(field)
    if value is None:
        return None
    ids = value if isinstance(value, list) and 1 <= len(value) <= MAX_INVOCATION_TOKENS else [None]
    if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in ids):
        raise bad_field(field, value, f"a list of 1 to {MAX_INVOCATION_TOKENS} token ids")
    if body.get("task_type") != "CAUSAL_LM":  # PEFT looks for the tokens in this kind of model alone
        raise bad_field("task_type", body.get("task_type"), f"'CAUSAL_LM' where {field} is given")
    return tuple(ids)


def _modules_to_save(body: Body) -> frozenset[str]:
    """Only embeddings and heads can be served whole. Which of them a base has, `token_layers` knows."""
    value = body.get("modules_to_save")
    if value is None:
        return frozenset()
    names = value if isinstance(value, list) and len(value) <= MAX_ENTRIES else [value]
    for name in names:
        if not isinstance(name, str) or name not in SAVED_WHOLE:
            message = f"modules_to_save: only the embedding and the head are served whole, got {shown(name)}"
            raise AdapterRejected("unsupported_modules_to_save", message, param="modules_to_save")
    return frozenset(names)


def _names(field: str, value: object) -> frozenset[str] | ModulePattern:
    if is_empty(value):
        return frozenset()
    if isinstance(value, str):
        return ModulePattern(value)
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise bad_field(field, value, f"a list of at most {MAX_ENTRIES} names")
    for name in value:
        if not isinstance(name, str) or not name:
            raise bad_field(field, name, "a list of module names")
    return frozenset(value)


def _target_parameters(body: Body) -> frozenset[str]:
    """Names alone: PEFT takes no regular expression here."""
    names = _names("target_parameters", value := body.get("target_parameters"))
    if not isinstance(names, frozenset):
        raise bad_field("target_parameters", value, "a list of parameter names")
    return names


def _targets(body: Body, *, may_be_none: bool) -> frozenset[str] | ModulePattern | None:
    value = body["target_modules"]
    if isinstance(value, str) and value.lower() == "all-linear":
        return None
    names = _names("target_modules", value)
    if not names and not may_be_none:
        raise bad_field("target_modules", value, "a list of module names or 'all-linear'")
    return names


def _pattern(field: str, body: Body) -> list[tuple[str, object]]:
    value = body.get(field)
    if value is None:
        return []
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise bad_field(field, value, f"an object of at most {MAX_ENTRIES} entries")
    for key in value:
        if PATTERN_KEY.fullmatch(key) is None:
            message = f"{field}: key {shown(key)} is a regular expression and is not run; give a module name or its end"
            raise AdapterRejected("regex_pattern", message, param=field)
    return list(value.items())


def _layers(body: Body, *, by_list: bool) -> frozenset[int] | None:
    value = body.get("layers_to_transform")
    if value is None:
        return None
    if not by_list:
        raise bad_field(
            "layers_to_transform", value, "absent if target_modules is 'all-linear' or a regular expression"
        )
    layers = value if isinstance(value, list) else [value]
    if len(layers) > MAX_ENTRIES or any(not isinstance(item, int) or isinstance(item, bool) for item in layers):
        raise bad_field("layers_to_transform", value, f"a layer number or a list of at most {MAX_ENTRIES}")
    if not layers:
        return None  # PEFT takes an empty list for "every layer"
    return frozenset(layers)


def _layers_pattern(body: Body, *, by_list: bool) -> tuple[str, ...]:
    value = body.get("layers_pattern")
    if value is None or (by_list and is_empty(value)):
        return ()
    patterns = value if isinstance(value, list) else [value]
    if not by_list or body.get("layers_to_transform") is None or len(patterns) > MAX_LAYERS_PATTERNS:
        wanted = f"absent without layers_to_transform, and at most {MAX_LAYERS_PATTERNS} names"
        raise bad_field("layers_pattern", value, wanted)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.isidentifier() or not pattern.isascii():
            message = f"layers_pattern: {shown(pattern)} is not a plain name, and a regular expression is not run"
            raise AdapterRejected("regex_pattern", message, param="layers_pattern")
    return tuple(patterns)

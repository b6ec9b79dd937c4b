"""Header + config + base -> a checked plan: each tensor belongs to one module, with the rank and shape PEFT means.

Decides what is refused; a tensor that fits nowhere is never skipped. Knows shapes and names; `check_values` is the
only part that sees a tensor's values.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from adapters_store.base.description import BaseDescription, LinearShape
from adapters_store.base.families import HEAD, family_of
from adapters_store.base.token_weights import token_weight_sha256
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import LoraConfig
from adapters_store.format.dtypes import TENSOR_TYPES, Bits, largest_magnitude, overflow_limit, type_of_base
from adapters_store.format.experts.plan import ENDINGS, PlannedExperts, planned_experts, trains_experts
from adapters_store.format.experts.targets import is_router, router_rank, targets_weight
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import MAGNITUDE, SafetensorsHeader, TensorEntry, rejected
from adapters_store.format.token_layers import PREFIX, TokenLayer, of_text_side, token_layers
from adapters_store.parsing.patterns import ModulePattern
from adapters_store.parsing.strict_json import shown

_MAGNITUDE_ENDINGS = tuple(f".{MAGNITUDE}{name}{ending}" for name in ("", ".default") for ending in ("", ".weight"))
_UNSUPPORTED_NAMES = {
    "lora_embedding_": "unsupported_embedding_lora",
    MAGNITUDE: "unsupported_dora",
    "lora_diag": "unsupported_kasa",
    "modules_to_save": "unsupported_modules_to_save",
    ".bias": "unsupported_bias",
}
_MAX_PATTERN_WORK = 1_200_000  # keys x pairs of tensors: every layer of a 405B model in its own key, with DoRA's


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One targeted linear layer: `a` is [rank, in_features], `b` is [out_features, rank], and DoRA's `magnitude`
    [1, out_features]."""

    name: str
    rank: int
    scale: float
    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None = None


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A weight of the base in the file, that PEFT writes beside an adapter of the head; sha256: the base's own."""

    entry: TensorEntry
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """A checked adapter: its modules in the base's order, and how its chats are written.

    token_layers: its own embedding and head, or LoRA on the embedding.
    copies: no part of the adapter; it is served if their bytes are the base's.
    alora_invocation_tokens: see `LoraConfig`. is_int8: its linear layers are kept as bytes.
    experts: parameters of the base's experts, in its order.
    """

    base: BaseDescription
    modules: tuple[PlannedModule, ...]
    token_layers: tuple[TokenLayer, ...] = ()
    copies: tuple[BaseCopy, ...] = ()
    alora_invocation_tokens: tuple[int, ...] | None = None
    tool_dialect: str | None = None
    chat_template: str | None = None
    is_int8: bool = False
    experts: tuple[PlannedExperts, ...] = ()

    @property
    def max_rank(self) -> int:
        return max((part.rank for part in self._parts), default=0)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is DoRA."""
        return any(module.magnitude is not None for module in self.modules)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last names of the layers that it changes, sorted: ("down_proj", "q_proj")."""
        return tuple(sorted({part.name.rpartition(".")[2] for part in self._parts}))

    @property
    def _parts(self) -> list[PlannedModule | TokenLayer | PlannedExperts]:
        return [*self.modules, *self.token_layers, *self.experts]


def plan_adapter(
    config: LoraConfig, header: SafetensorsHeader, base: BaseDescription, limits: AdapterLimits
) -> AdapterPlan:
    """Match every tensor with a module of the base and check it.

    Raises:
        AdapterRejected: wrong_base, unknown_tensor, unsupported_full_weight, unknown_module, untargeted_module,
            regex_targets, duplicate_tensor, missing_a, missing_b, missing_magnitude, missing_tensors, unmatched_target,
            rank_mismatch, rank_too_large, wrong_shape, pattern_too_large, bad_field, no_tensors, a code of
            `token_layers` or `planned_experts`, or the code of an unsupported kind of tensor.
    """
    _check_base_digest(config, header, base)
    if max(len(config.rank_pattern), len(config.alpha_pattern)) * (len(header.tensors) // 2) > _MAX_PATTERN_WORK:
        message = f"rank_pattern and alpha_pattern: keys x modules may be {_MAX_PATTERN_WORK} at most"
        raise AdapterRejected("pattern_too_large", message, param="rank_pattern")
    config, header = of_text_side(config, header)
    layers = token_layers(config, header, base, limits)
    taken = {entry.name for layer in layers for entry in layer.entries}
    targeted = base if trains_experts(config, header, base) else _without_experts(base)
    experts = planned_experts(config, header, targeted, limits)
    taken |= {entry.name for stack in experts for part in stack.parts for entry in (part.a, part.b)}
    copies = tuple(_copies(header, base, taken))
    pairs = _pair_tensors(header, base, taken | {copy.entry.name for copy in copies}, use_dora=config.use_dora)
    _check_targets(config, pairs, targeted, {layer.name for layer in layers if layer.rank})
    order = base.module_index
    names = sorted(pairs, key=lambda name: order[name])
    modules = tuple(_plan_module(name, pairs[name], config, base, limits) for name in names)
    if not (modules or layers or experts):
        raise rejected("no_tensors", "weights: the file holds nothing but copies of the base's own weights")
    invocation = config.alora_invocation_tokens
    _check_invocation(invocation, base)
    chat = config.tool_dialect, config.chat_template
    return AdapterPlan(base, modules, layers, copies, invocation, *chat, config.is_int8, experts)


def _check_base_digest(config: LoraConfig, header: SafetensorsHeader, base: BaseDescription) -> None:
    for digest in (config.base_digest, header.metadata.get("multilora_base_digest")):
        if digest is not None and digest != base.digest:
            message = f"made for base {shown(digest)}, this base is {base.digest} ({base.name})"
            raise AdapterRejected("wrong_base", message, param="multilora_base_digest")


def _without_experts(base: BaseDescription) -> BaseDescription:
    modules = {name: shape for name, shape in base.modules.items() if not is_router(name, base)}
    return replace(base, modules=modules, experts={})


def _check_invocation(token_ids: tuple[int, ...] | None, base: BaseDescription) -> None:
    head = base.modules.get(HEAD)
    if token_ids is not None and head is not None and max(token_ids) >= head.out_features:
        message = f"alora_invocation_tokens: {max(token_ids)} is no token of the base, which has {head.out_features}"
        raise AdapterRejected("bad_field", message, param="alora_invocation_tokens")


def _copies(header: SafetensorsHeader, base: BaseDescription, taken: Container[str]) -> Iterator[BaseCopy]:
    """Tensors that may be the base's embedding or head: by name, shape and type. taken: the adapter's own names."""
    whole = [entry for entry in header.tensors if "lora_" not in entry.name and entry.name not in taken]
    if not whole:
        return
    modules = {
        f"{PREFIX}{module}{layer}.weight": module
        for module in (family_of(base.architecture).embedding, HEAD)
        for layer in ("", ".base_layer")
    }
    head = base.modules.get(HEAD)
    shape = None if head is None else (head.out_features, head.in_features)
    for entry in whole:
        if entry.name in modules and entry.shape == shape:
            sha256 = token_weight_sha256(base, modules[entry.name], entry.dtype)
            if sha256 is not None:
                yield BaseCopy(entry, sha256)


def _pair_tensors(
    header: SafetensorsHeader, base: BaseDescription, others: Container[str], *, use_dora: bool
) -> dict[str, dict[str, TensorEntry]]:
    """Module path -> {"A": entry, "B": entry}, and with DoRA its "magnitude". others: names of tensors that belong to
    no pair."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for entry in header.tensors:
        if entry.name in others:
            continue
        magnitude = _magnitude_of(entry.name) if use_dora else None
        module, side = magnitude or _parse_name(entry, base)
        if module not in base.modules:
            raise rejected("unknown_module", f"{entry.name}: the base {base.name} has no linear layer {module}")
        pair = pairs.setdefault(module, {})
        if side in pair:
            raise rejected("duplicate_tensor", f"{entry.name}: {pair[side].name} is the same tensor")
        pair[side] = entry
    for module, pair in pairs.items():
        for side, code in (("A", "missing_a"), ("B", "missing_b")):
            if side not in pair:
                raise rejected(code, f"{module}: lora_{side}.weight is missing")
        if use_dora and MAGNITUDE not in pair:
            raise rejected("missing_magnitude", f"{module}: {MAGNITUDE} is missing, and the config says use_dora")
    return pairs


def _magnitude_of(name: str) -> tuple[str, str] | None:
    """The module whose magnitudes the tensor `name` holds, as `_parse_name` returns it."""
    ending = next((ending for ending in _MAGNITUDE_ENDINGS if name.endswith(ending)), None)
    return (name[len(PREFIX) : -len(ending)], MAGNITUDE) if ending and name.startswith(PREFIX) else None


def _parse_name(entry: TensorEntry, base: BaseDescription) -> tuple[str, str]:
    name = entry.name
    if name.startswith(PREFIX):
        for ending, side in ENDINGS.items():
            if name.endswith(ending):
                return name[len(PREFIX) : -len(ending)], side
    for part, code in _UNSUPPORTED_NAMES.items():
        if part in name:
            why = "; the config does not say use_dora" if part == MAGNITUDE else ""
            raise rejected(code, f"{name}: this kind of tensor is not served{why}")
    if name.endswith(".weight") and "lora_" not in name:
        advice = _advice_on_weight(entry, base)
        raise rejected("unsupported_full_weight", f"{name}: a whole weight of the base, not LoRA; {advice}")
    wanted = f"{PREFIX}<module>.lora_A.weight or .lora_B.weight"
    raise rejected("unknown_tensor", f"{name}: no part of a LoRA adapter; names are {wanted}")


def _advice_on_weight(entry: TensorEntry, base: BaseDescription) -> str:
    """The way out that fits: PEFT writes head and embedding beside the LoRA of either, and if a vocabulary grew."""
    is_embedding = family_of(base.architecture).embedding.rpartition(".")[2] in entry.name
    head = base.modules.get(HEAD)
    if not is_embedding and HEAD not in entry.name:
        return "train the adapter with LoRA alone, or serve the merged model as a base"
    if head is not None and entry.shape != (head.out_features, head.in_features):
        of_base = f"[{head.out_features}, {head.in_features}]"
        return (
            f"its size is {list(entry.shape)} and the base's is {of_base}: the vocabulary was changed, and "
            "without it the rows trained so would be lost; merge the adapter into its own base and serve that as a base"
        )
    return "if it was not trained, save the adapter with save_embedding_layers=False; else train it as modules_to_save"


def _check_targets(
    config: LoraConfig, pairs: dict[str, dict[str, TensorEntry]], base: BaseDescription, token_targets: Iterable[str]
) -> None:
    matched = {entry for name in token_targets for entry in config.entries_matching(name)}
    for module in pairs:
        if not _is_targeted(config, module, base):
            if isinstance(config.target_modules, ModulePattern):
                message = f"target_modules: the regular expression does not match {module}, which has tensors"
                raise AdapterRejected("regex_targets", message, param="target_modules")
            raise rejected("untargeted_module", f"{module}: has tensors, but the config does not target it")
        matched.update(config.entries_matching(module))
    if without := _targets_without_tensors(config, matched, base):
        message = f"target_modules: {shown(min(without))} matches layers of the base, and no tensor of the file"
        raise AdapterRejected("unmatched_target", message, param="target_modules")
    if config.zero_by_default:
        return  # PEFT leaves a targeted module without tensors at a zero delta, and so do we
    for module in base.modules:
        if module not in pairs and _is_targeted(config, module, base):
            message = f"{module}: targeted, without tensors, and init_lora_weights does not make it a zero delta"
            raise rejected("missing_tensors", message)


def _is_targeted(config: LoraConfig, module: str, base: BaseDescription) -> bool:
    return config.targets(module) or (is_router(module, base) and targets_weight(config, module))


def _targets_without_tensors(config: LoraConfig, matched: set[str], base: BaseDescription) -> set[str]:
    """Targets that mean something in this base and have no tensors: half an adapter.

    A name that the base has no module for, or that exclude_modules takes away whole, means nothing in PEFT either.
    """
    if not isinstance(config.target_modules, frozenset) or not config.excludes_by_what_is_known:
        return set()
    unmatched = config.target_modules - matched
    if not unmatched:
        return set()
    embedding = family_of(base.architecture).embedding  # no linear layer, so not among the modules
    of_base = {entry for module in (*base.modules, embedding) for entry in config.entries_matching(module)}
    return of_base & unmatched


def _plan_module(
    name: str, pair: dict[str, TensorEntry], config: LoraConfig, base: BaseDescription, limits: AdapterLimits
) -> PlannedModule:
    is_layer = not is_router(name, base)
    rank, scale = (config.rank_of(name), config.scale_of(name)) if is_layer else router_rank(config, name)
    if rank > limits.max_rank:
        raise rejected("rank_too_large", f"{name}: rank {rank} exceeds max_rank {limits.max_rank}")
    _check_shapes(pair["A"], pair["B"], rank, base.modules[name])
    magnitude, outputs = pair.get(MAGNITUDE), base.modules[name].out_features
    if magnitude is not None and magnitude.shape != (1, outputs):
        message = (
            f"{magnitude.name}: {magnitude.shape[0] * magnitude.shape[1]} magnitudes, the base has {outputs} outputs"
        )
        raise rejected("wrong_shape", message)
    return PlannedModule(name, rank, scale, pair["A"], pair["B"], magnitude)


def _check_shapes(a: TensorEntry, b: TensorEntry, rank: int, shape: LinearShape) -> None:
    for entry, in_file in ((a, a.shape[0]), (b, b.shape[1])):
        if in_file != rank:
            raise rejected("rank_mismatch", f"{entry.name}: rank {in_file}, the config says {rank}")
    for entry, in_file, of_base, what in (
        (a, a.shape[1], shape.in_features, "in_features"),
        (b, b.shape[0], shape.out_features, "out_features"),
    ):
        if in_file != of_base:
            raise rejected("wrong_shape", f"{entry.name}: {what} is {in_file}, the base has {of_base}")


def check_copy(copy: BaseCopy, sha256: str) -> None:
    """sha256: of the bytes in the file. Raises AdapterRejected (unsupported_full_weight) if they are not the base's."""
    if sha256 != copy.sha256:
        advice = "the adapter trained it whole, or was made on another base; train with LoRA alone, or serve the merged"
        message = f"{copy.entry.name}: a whole weight that is not the base's; {advice} model as a base"
        raise rejected("unsupported_full_weight", message)


def check_values(entry: TensorEntry, bits: Bits, base: BaseDescription) -> None:
    """Refuse values that are not finite, or would not be in the base's dtype.

    Raises:
        AdapterRejected: non_finite, cast_overflow.
    """
    source, target = TENSOR_TYPES[entry.dtype], type_of_base(base.dtype)
    largest = largest_magnitude(bits)
    if largest >= source.infinity:
        raise rejected("non_finite", f"{entry.name}: holds NaN or infinity")
    if largest >= overflow_limit(source, target):
        raise rejected("cast_overflow", f"{entry.name}: a {source.name} value overflows the base's {base.dtype}")

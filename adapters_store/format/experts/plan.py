"""Header + config + base -> what an adapter changes of the base's experts, checked. Knows names and shapes, no values.

Two forms of names are read. PEFT 0.21 wraps a layer's parameters one around the other, the last one outermost:

    mlp.experts.base_layer.lora_A.weight   gate_up_proj   [experts * rank, in]; lora_B: [out, rank * experts]
    mlp.experts.lora_A.weight              down_proj, or the only one that is targeted

Before, each expert had layers of its own: mlp.experts.3.gate_proj.lora_A.weight. They are joined as PEFT joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from adapters_store.base.description import BaseDescription, ExpertsShape
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import LoraConfig
from adapters_store.format.experts.targets import LAYERS_OF, ExpertTargets, is_router, refuse_kinds
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import SafetensorsHeader, TensorEntry, rejected
from adapters_store.format.token_layers import PREFIX

ENDINGS = {f".lora_{side}{name}.weight": side for side in "AB" for name in ("", ".default")}
_INNER = ".base_layer"

Pairs = dict[str, dict[str, TensorEntry]]  # path -> {"A": entry, "B": entry}


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One A and B in the file. expert None: of all experts at once, A expert by expert; B's columns lie rank by rank,
    and within a rank expert by expert. Else of one expert: these ranks and outputs of it, from the first ones on."""

    a: TensorEntry
    b: TensorEntry
    expert: int | None = None
    first_rank: int = 0
    first_output: int = 0


@dataclass(frozen=True, slots=True)
class PlannedExperts:
    """One targeted parameter of a layer's experts. rank: of each expert."""

    name: str
    rank: int
    scale: float
    parts: tuple[ExpertPart, ...]


def trains_experts(config: LoraConfig, header: SafetensorsHeader, base: BaseDescription) -> bool:
    """Whether the adapter was trained on experts or routers. Else the names of its targets mean other layers: it was
    saved by a PEFT that saw neither, and leaves them as they are."""
    if config.target_parameters:
        return True
    containers = {stack.rpartition(".")[0] for stack in base.experts}
    paths = (entry.name.removeprefix(PREFIX).partition(".lora_")[0] for entry in header.tensors if containers)
    return any(path in containers or _container_of(path) in containers or is_router(path, base) for path in paths)


def planned_experts(
    config: LoraConfig, header: SafetensorsHeader, base: BaseDescription, limits: AdapterLimits
) -> tuple[PlannedExperts, ...]:
    """In the base's order.

    Raises:
        AdapterRejected: unsupported_target_parameters, unsupported_dora, untargeted_module, unknown_module,
            duplicate_tensor, missing_a, missing_b, missing_tensors, rank_mismatch, rank_too_large, wrong_shape.
    """
    targets = ExpertTargets.of(config, base)
    pairs = _pairs(header, {stack.rpartition(".")[0] for stack in base.experts})
    if pairs:
        refuse_kinds(config, min(pairs))
    planned = []
    for stack in base.experts:
        parts = tuple(_parts(stack, pairs, targets, base.experts[stack]))
        if parts:
            planned.append(_checked(stack, parts, targets, base.experts[stack], limits))
        elif stack in targets.stacks and not config.zero_by_default:
            message = f"{stack}: targeted, without tensors, and init_lora_weights does not make it a zero delta"
            raise rejected("missing_tensors", message)
    if pairs:
        raise _left_over(min(pairs), targets, base)
    return tuple(planned)


def _pairs(header: SafetensorsHeader, containers: set[str]) -> Pairs:
    """The tensors under the base's experts, by the path before "lora_A"."""
    pairs: Pairs = {}
    for entry in header.tensors if containers else ():
        ending = next((ending for ending in ENDINGS if entry.name.endswith(ending)), None)
        path = entry.name[len(PREFIX) : -len(ending)] if ending and entry.name.startswith(PREFIX) else ""
        if ending is None or not (path in containers or _container_of(path) in containers):
            continue
        pair, side = pairs.setdefault(path, {}), ENDINGS[ending]
        if side in pair:
            raise rejected("duplicate_tensor", f"{entry.name}: {pair[side].name} is the same tensor")
        pair[side] = entry
    for path, pair in pairs.items():
        for side, code in (("A", "missing_a"), ("B", "missing_b")):
            if side not in pair:
                raise rejected(code, f"{path}: lora_{side}.weight is missing")
    return pairs


def _container_of(path: str) -> str:
    """m.experts.base_layer and m.experts.3.up_proj -> m.experts"""
    return path.removesuffix(_INNER) if path.endswith(_INNER) else path.rsplit(".", 2)[0]


def _parts(stack: str, pairs: Pairs, targets: ExpertTargets, shape: ExpertsShape) -> Iterator[ExpertPart]:
    """What the file has for one parameter; taken out of pairs."""
    if stack not in targets.stacks:
        return
    container, _, name = stack.rpartition(".")
    both = all(f"{container}.{other}" in targets.stacks for other in LAYERS_OF)
    pair = pairs.pop(container + (_INNER if both and name == "gate_up_proj" else ""), None)
    if pair is not None:
        yield ExpertPart(pair["A"], pair["B"])
        return
    if name not in targets.joined or (name == "gate_up_proj" and not both):
        return  # PEFT would look for the joined tensors under another name, and leave the parameter as it is
    paths = [path for path in _paths(container, shape) if path.rpartition(".")[2] in LAYERS_OF[name]]
    if not any(path in pairs for path in paths):
        return
    count = len(LAYERS_OF[name])
    for index, path in enumerate(paths):
        if path not in pairs:
            raise rejected("missing_tensors", f"{path}: has no tensors, and another expert of its layer has")
        old = _OldLayer(path, *divmod(index, count), count)
        yield _part_of_one(old, pairs.pop(path), stack, targets, shape)


def _paths(container: str, shape: ExpertsShape) -> list[str]:
    """The layers that a layer's experts were, expert by expert."""
    layers = [layer for names in LAYERS_OF.values() for layer in names]
    return [f"{container}.{expert}.{layer}" for expert in range(shape.num_experts) for layer in layers]


class _OldLayer(NamedTuple):
    """One expert's layer as it was. place: which of the `joined` layers that become one."""

    path: str
    expert: int
    place: int
    joined: int


def _part_of_one(
    old: _OldLayer, pair: Mapping[str, TensorEntry], stack: str, targets: ExpertTargets, shape: ExpertsShape
) -> ExpertPart:
    path, expert, place, count = old
    rank, scale = targets.config.rank_of(path), targets.config.scale_of(path)
    if (rank * count, scale) != (targets.rank_of(stack), targets.scale_of(stack)):
        message = (
            f"{path}: trained with rank {rank} and scale {scale:.6g}; PEFT 0.21 joins it to experts of rank "
            f"{targets.rank_of(stack)} and scale {targets.scale_of(stack):.6g} (it drops patterns of gate_proj and "
            "up_proj, and scales rsLoRA otherwise), so what the adapter means is not clear"
        )
        raise rejected("rank_mismatch", message)
    outputs = shape.out_features // count
    _check_shape(pair["A"], (rank, shape.in_features))
    _check_shape(pair["B"], (outputs, rank))
    return ExpertPart(pair["A"], pair["B"], expert, place * rank, place * outputs)


def _checked(
    stack: str, parts: tuple[ExpertPart, ...], targets: ExpertTargets, shape: ExpertsShape, limits: AdapterLimits
) -> PlannedExperts:
    rank = targets.rank_of(stack)
    if rank > limits.max_rank:
        raise rejected("rank_too_large", f"{stack}: rank {rank} exceeds max_rank {limits.max_rank}")
    if parts[0].expert is None:
        ranks = rank * shape.num_experts
        _check_shape(parts[0].a, (ranks, shape.in_features))
        _check_shape(parts[0].b, (shape.out_features, ranks))
    return PlannedExperts(stack, rank, targets.scale_of(stack), parts)


def _check_shape(entry: TensorEntry, wanted: tuple[int, int]) -> None:
    if entry.shape != wanted:
        raise rejected("wrong_shape", f"{entry.name}: its size is {list(entry.shape)}, {list(wanted)} is needed")


def _left_over(path: str, targets: ExpertTargets, base: BaseDescription) -> AdapterRejected:
    """Tensors that belong to no targeted parameter."""
    layers = {stack.rpartition(".")[0]: shape for stack, shape in base.experts.items()}
    container = path if path in layers else _container_of(path)
    if path not in (container, container + _INNER, *_paths(container, layers[container])):
        experts = f"{layers[container].num_experts} experts with gate_proj, up_proj and down_proj"
        return rejected("unknown_module", f"{path}: is no part of {container}, which are {experts}")
    names = sorted({stack.rpartition(".")[2] for stack in targets.stacks})
    message = (
        f"{path}: has tensors, and the config targets {' and '.join(names) or 'none'} of the experts' parameters: PEFT "
        "would leave them out. For layers of single experts, target_modules names gate_proj, up_proj and down_proj"
    )
    return rejected("untargeted_module", message)

"""Which experts and routers of a base a config targets, with which rank and scale, as PEFT 0.21 reads it.

PEFT targets parameters by `target_parameters`. A config from before transformers made parameters of experts names the
linear layers that they were (gate_proj, up_proj, down_proj). PEFT turns those targets into parameters when it loads
the adapter, and joins gate and up: twice the rank, twice the alpha.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import family_of
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import LoraConfig
from adapters_store.parsing.patterns import ModulePattern
from adapters_store.parsing.strict_json import shown

LAYERS_OF = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # as they were, in their order


@dataclass(frozen=True, slots=True)
class ExpertTargets:
    """stacks: the targeted parameters of the base, in its order. joined: names whose layers the config targets as they
    were before."""

    config: LoraConfig
    stacks: tuple[str, ...]
    joined: frozenset[str]

    @classmethod
    def of(cls, config: LoraConfig, base: BaseDescription) -> ExpertTargets:
        """Raises AdapterRejected (unsupported_target_parameters) for a target that is no parameter of experts, and no
        router's weight."""
        served = [*base.experts, *(f"{module}.weight" for module in base.modules if is_router(module, base))]
        for entry in sorted(config.target_parameters):
            if not any(_matches(entry, parameter) for parameter in served):
                raise AdapterRejected("unsupported_target_parameters", _not_served(entry, base), param=_FIELD)
        joined = frozenset(_joined(config, base))
        wanted = config.target_parameters | joined
        stacks = (stack for stack in base.experts if any(_matches(entry, stack) for entry in wanted))
        return cls(config, tuple(stacks), joined)

    def rank_of(self, stack: str) -> int:
        return self.config.rank_of(stack, times=self._times(stack))

    def scale_of(self, stack: str) -> float:
        return self.config.scale_of(stack, times=self._times(stack))

    def _times(self, stack: str) -> int:
        name = stack.rpartition(".")[2]
        return len(LAYERS_OF[name]) if name in self.joined else 1


_FIELD = "target_parameters"


def is_router(module: str, base: BaseDescription) -> bool:
    return bool(base.experts) and family_of(base.architecture).is_router(module)


def targets_weight(config: LoraConfig, module: str) -> bool:
    """Whether `target_parameters` has the module's weight."""
    return any(_matches(entry, f"{module}.weight") for entry in config.target_parameters)


def router_rank(config: LoraConfig, module: str) -> tuple[int, float]:
    """Rank and scale of a router, which is a parameter to PEFT, and was a linear layer.

    Raises AdapterRejected: rank_mismatch, where the two differ for one that is targeted as a layer; unsupported_dora,
    unsupported_target_parameters, for what PEFT has not for parameters."""
    refuse_kinds(config, module)
    own, was = ((config.rank_of(name), config.scale_of(name)) for name in (f"{module}.weight", module))
    if own != was and not targets_weight(config, module):
        message = (
            f"{module}: trained with rank {was[0]} and scale {was[1]:.6g}, and PEFT 0.21 gives its weight "
            f"rank {own[0]} and scale {own[1]:.6g}, because no pattern names {module.rpartition('.')[2]}.weight"
        )
        raise AdapterRejected("rank_mismatch", message, param="weights")
    return own


def refuse_kinds(config: LoraConfig, path: str) -> None:
    """PEFT has neither for parameters."""
    if config.use_dora:
        message = f"{path}: DoRA on experts and routers is not served; train them with plain LoRA"
        raise AdapterRejected("unsupported_dora", message, param="weights")
    if config.alora_invocation_tokens is not None:
        message = f"{path}: an activated LoRA on experts and routers is not served; leave them out of its targets"
        raise AdapterRejected("unsupported_target_parameters", message, param="weights")


def _matches(entry: str, stack: str) -> bool:
    return entry == stack or stack.endswith(f".{entry}")


def _not_served(entry: str, base: BaseDescription) -> str:
    names = sorted({stack.rpartition(".")[2] for stack in base.experts})
    served = f"served are the experts' {', '.join(names)} and the router" if names else f"{base.name} has no experts"
    return f"{_FIELD}: {shown(entry)} is not served; {served}"


def _joined(config: LoraConfig, base: BaseDescription) -> Iterator[str]:
    """Half of what is joined targets nothing here: with tensors it is refused, see `planned_experts`."""
    containers = {stack.rpartition(".")[0] for stack in base.experts}
    for name, layers in LAYERS_OF.items():
        if containers and all(_is_named(config, layer, containers) for layer in layers):
            yield name


def _is_named(config: LoraConfig, layer: str, containers: set[str]) -> bool:
    targets = config.target_modules
    if targets is None:  # all-linear
        return True
    if isinstance(targets, ModulePattern):
        return any(targets.matches(f"{container}.{layer}") is not False for container in containers)
    return any(_matches(layer, entry) for entry in targets)

"""What an adapter must fit: the identity and the linear layers of one frozen base model. Knows no tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any, NewType

AdapterDigest = NewType("AdapterDigest", str)  # "sha256:<64 hex>", names one immutable adapter version

PACKED_FORMAT = 2  # counts changes of packing.py's layout


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of the base: weight is [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """One parameter of a layer's experts: [num_experts, out_features, in_features]."""

    num_experts: int
    in_features: int
    out_features: int


def expert_name(stack: str, expert: int) -> str:
    """One expert's part of a parameter, as a layer of its own."""
    return f"{stack}.{expert}"


@dataclass(frozen=True)
class BaseDescription:
    """The frozen base as the store sees it.

    modules: dotted module path as in the base's own state dict, without the ".weight" suffix
        (e.g. "model.layers.0.self_attn.q_proj") -> shape, in model order. These are the layers an adapter may target.
    groups: module paths that read the same input (q/k/v, gate/up), each module in exactly one group, in model order.
    digest: "sha256:<hex>" over the base's config and weights.
    dtype: "bfloat16", "float16" or "float32": the type adapters are kept and computed in.
    folder: where its files were when it was described; None: not on this machine.
    nf4: whether its linear layers are quantised to NF4 when it is loaded; those of a base stored so are already.
    experts: parameter path ("model.layers.0.mlp.experts.down_proj") -> shape, in model order. Adapters may target these
        too, all experts of a layer at once.
    """

    digest: str
    name: str
    architecture: str
    dtype: str
    modules: Mapping[str, LinearShape]
    groups: tuple[tuple[str, ...], ...] = field(default=())
    folder: str | None = None
    nf4: bool = False
    experts: Mapping[str, ExpertsShape] = field(default_factory=dict)

    @cached_property
    def table_rows(self) -> dict[str, LinearShape]:
        """What has a row in the device table, in its order: the linear layers, then each parameter's experts side by
        side (`expert_name`)."""
        rows = dict(self.modules)
        for stack, shape in self.experts.items():
            one = LinearShape(shape.in_features, shape.out_features)
            rows |= {expert_name(stack, expert): one for expert in range(shape.num_experts)}
        return rows

    @cached_property
    def module_index(self) -> dict[str, int]:
        """Name -> its row in the device table."""
        return {name: index for index, name in enumerate(self.table_rows)}

    def first_row_of(self, stack: str) -> int:
        """The row of the first expert of a parameter in `experts`."""
        return self.module_index[expert_name(stack, 0)]

    @property
    def hidden_size(self) -> int:
        """What the first layer reads of a token."""
        return next(iter(self.modules.values())).in_features

    @cached_property
    def layout_key(self) -> str:
        """16 hex digits over all that the packed form of an adapter depends on."""
        shapes = {name: (shape.in_features, shape.out_features) for name, shape in self.modules.items()}
        rest = [*(["nf4"] if self.nf4 else []), *([self._experts] if self.experts else [])]
        text = json.dumps([PACKED_FORMAT, self.digest, self.dtype, shapes, self.groups, *rest])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def _experts(self) -> dict[str, tuple[int, int, int]]:
        return {name: astuple(shape) for name, shape in self.experts.items()}

    def to_json(self) -> str:
        """A canonical text of this description, the inverse of `from_json`."""
        shapes = {name: [shape.in_features, shape.out_features] for name, shape in self.modules.items()}
        body = {
            "digest": self.digest,
            "name": self.name,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "modules": shapes,
            "groups": [list(group) for group in self.groups],
            "folder": self.folder,
            **({"nf4": True} if self.nf4 else {}),
            **({"experts": self._experts} if self.experts else {}),
        }
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> BaseDescription:
        """Read what `to_json` wrote."""
        body: dict[str, Any] = json.loads(text)
        modules = {name: LinearShape(*shape) for name, shape in body["modules"].items()}
        groups = tuple(tuple(group) for group in body["groups"])
        folder, nf4 = body.get("folder"), body.get("nf4", False)  # absent in what an older server remembered
        experts = {name: ExpertsShape(*shape) for name, shape in body.get("experts", {}).items()}
        named = body["digest"], body["name"], body["architecture"], body["dtype"]
        return cls(*named, modules, groups, folder, nf4, experts)

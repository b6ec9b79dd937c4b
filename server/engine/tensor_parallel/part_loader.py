"""Reads a base tensor by tensor, and keeps of each what one rank needs. Knows files, NF4 and transformers' loader; no
adapters.

Each tensor passes transformers' quantiser before it becomes a parameter: there it is cut, and the whole one freed. So
no process has more of the base than its part and one tensor. A weight in NF4 is cut in whole blocks after it was
quantised whole: the values are those of one process, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from adapters_store.base.families import HEAD, UnsupportedBase
from adapters_store.base.files import load_config
from adapters_store.base.folder import reading, weight_files
from adapters_store.base.nf4 import (
    absmaxes,
    is_stored_in_nf4,
    make_linears_4bit,
    packed_in_nf4,
    quantized,
)
from adapters_store.base.tensors import NF4_MARK, model_class
from adapters_store.base.weights import checked
from lora_kernels.nf4.weight import NF4_BLOCK
from server.engine.tensor_parallel.cuts import INPUTS, OUTPUTS, Cut, Cuts

METHOD = "multilora_part"


def load_part(path: Path, part: Part, dtype: torch.dtype, **options: Any) -> Any:
    """transformers' model of a local folder, its divided layers cut. options: of `from_pretrained`.

    Raises UnsupportedBase, as `load_causal` does."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PartLoader)
    config = load_config(path)
    is_stored = is_stored_in_nf4(config)
    vars(config).pop("quantization_config", None)  # what the files hold in NF4 is known by name
    with reading(path, "the weights"), ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(path)]
        tensors = dict(each for file in files for each in _tensors(path, file))
        stored = frozenset(name for name, tensor in tensors.items() if isinstance(tensor, _Packed))
        model, info = model_class(config).from_pretrained(
            None,
            config=config,
            dtype=dtype,
            state_dict=tensors,
            local_files_only=True,
            output_loading_info=True,
            quantization_config=PartConfig(part, dtype, stored),
            **options,
        )
    return checked(path, model, info, dtype if is_stored else None)


@dataclass(frozen=True)
class _Packed:
    """A weight that a file holds in NF4. transformers reads it as any other, `[...]` and `.to`: nothing happens."""

    file: Any
    name: str
    about: tuple[str, ...]

    def __getitem__(self, key: object) -> _Packed:
        return self

    def to(self, **options: object) -> _Packed:
        return self

    def read(self, device: torch.device) -> tuple[torch.Tensor, Any]:
        """The packed bytes, and bitsandbytes' QuantState."""
        about = {name: self.file.get_tensor(name) for name in self.about}
        return packed_in_nf4(self.file.get_tensor(self.name), about, device)


def _tensors(folder: Path, file: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of one file, unread."""
    names = set(file.keys())
    packed = {name.removesuffix(NF4_MARK) for name in names if name.endswith(NF4_MARK)}
    about = {name: tuple(each for each in names if each.startswith(f"{name}.")) for name in packed}
    for name in packed:
        block = json.loads(bytes(file.get_tensor(name + NF4_MARK).tolist()))["blocksize"]
        if block != NF4_BLOCK:
            message = f"{name} is stored in NF4 blocks of {block}, and only blocks of {NF4_BLOCK} are divided"
            raise UnsupportedBase(f"--base {folder}: {message}")
        yield name, _Packed(file, name, about[name])
    for name in names.difference(packed, *about.values()):
        yield name, file.get_slice(name)


@dataclass(frozen=True)
class Part:
    """What one rank keeps."""

    cuts: Cuts
    rank: int
    device: torch.device

    def concerns(self, model: nn.Module, name: str) -> bool:
        """Whether the parameter is quantised or cut."""
        return _is_4bit(model, name) or self._is_dropped(model, name) or self._dim(model, name) is not None

    def of(self, model: nn.Module, name: str, value: Any) -> torch.Tensor:
        """The rank's part of a parameter that `concerns`."""
        if _is_4bit(model, name):
            return self._of_4bit(model, name.removesuffix(".weight"), value)
        dim, cut = self._dim(model, name), self._cut(name)
        if dim is None or cut is None:
            dropped: torch.Tensor = value[:0].clone()  # the first rank's head
            return dropped
        return cut.part(value, dim, self.rank).to(self.device)

    def _cut(self, name: str) -> Cut | None:
        """Experts are parameters of their own; of a linear layer weight and bias are cut."""
        return self.cuts.by_name.get(name) or self.cuts.by_name.get(name.rpartition(".")[0])

    def _dim(self, model: nn.Module, name: str) -> int | None:
        """Of the parameter, along which it is divided."""
        cut = self._cut(name)
        if cut is None:
            return None
        if name in self.cuts.base.experts:
            return cut.dim + 1
        if name.endswith(".bias"):
            return 0 if cut.dim == OUTPUTS else None
        is_transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)  # [in_features, out_features]
        return 1 - cut.dim if is_transposed else cut.dim

    def _is_dropped(self, model: nn.Module, name: str) -> bool:
        config: Any = model.config
        return name == f"{HEAD}.weight" and self.rank > 0 and not config.tie_word_embeddings

    def _of_4bit(self, model: nn.Module, path: str, value: Any) -> torch.Tensor:
        from bitsandbytes.nn import Params4bit

        if isinstance(value, _Packed):
            packed, state = value.read(self.device)
        else:
            weight = value.T if self.cuts.family.has_transposed_weights else value
            packed, state = quantized(weight.to(self.device).contiguous())
        cut = self.cuts.by_name.get(path)
        if cut is not None:
            packed, state = _cut_blocks(packed, state, cut, self.rank)
        weight_4bit: torch.Tensor = Params4bit(
            packed, quant_state=state, compress_statistics=state.nested, quant_type="nf4", bnb_quantized=True
        )
        return weight_4bit


def _is_4bit(model: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own == "weight" and type(model.get_submodule(path)).__name__ == "Linear4bit"


def _cut_blocks(packed: torch.Tensor, state: Any, cut: Cut, rank: int) -> tuple[torch.Tensor, Any]:
    """The rank's blocks, each with its own absmax in float32: what double quantisation makes of 256 neighbours, which a
    cut parts, is computed before. O: rows. B: blocks of a row. X: bytes of a block."""
    from bitsandbytes.functional import QuantState

    outs, inputs = state.shape
    num_blocks = inputs // state.blocksize
    cut = cut if cut.dim == OUTPUTS else replace(cut, sizes=(num_blocks,))
    packed_OBX = cut.part(packed.view(outs, num_blocks, -1), cut.dim, rank)
    absmax_OB = cut.part(absmaxes(state).view(outs, num_blocks), cut.dim, rank)
    shape = torch.Size((packed_OBX.shape[0], packed_OBX.shape[1] * state.blocksize))
    own = QuantState(
        absmax_OB.reshape(-1),
        shape=shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    return packed_OBX.reshape(-1, 1), own


def refuse_divided_blocks(cuts: Cuts) -> None:
    """Raises UnsupportedBase, with the numbers, if a rank's part of a weight in NF4 is not of whole blocks."""
    for name, cut in cuts.by_name.items():
        shape = cuts.base.modules.get(name)
        if shape is None:  # experts are never in NF4
            continue
        own = shape.in_features // (cuts.num_ranks if cut.dim == INPUTS else 1)
        if own % NF4_BLOCK:
            whole = f" of {shape.in_features}" if own != shape.in_features else ""
            message = f"{name}: a rank has {own}{whole} inputs, which NF4's blocks of {NF4_BLOCK} do not divide"
            raise UnsupportedBase(f"--tensor-parallel {cuts.num_ranks}: {cuts.base.name}: {message}")


class PartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For `PartLoader`. stored: weights that the files hold in NF4."""

    def __init__(self, part: Part, dtype: torch.dtype, stored: frozenset[str]) -> None:
        self.quant_method: Any = METHOD
        self.part = part
        self.dtype = dtype
        self.stored = stored


class PartLoader(HfQuantizer):  # type: ignore[misc]
    """Cuts each tensor on its way into the model."""

    requires_calibration = False
    quantization_config: PartConfig

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        given = self.quantization_config
        names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
        if not given.part.cuts.base.nf4:
            names = [name for name in names if _stored_names(name) & given.stored]
        make_linears_4bit(model, [name for name in names if name != HEAD], given.dtype)
        model.is_loaded_in_4bit = given.part.cuts.base.nf4 or bool(given.stored)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        return self.quantization_config.part.concerns(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Cutting(self.quantization_config.part)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _stored_names(module: str) -> set[str]:
    """Files of some bases lack the name of the whole model."""
    return {f"{module}.weight", f"{module.partition('.')[2]}.weight"}


class _Cutting(ConversionOps):  # type: ignore[misc]
    def __init__(self, part: Part) -> None:
        self._part = part

    def convert(self, input_dict: Mapping[str, Any], *, model: Any, **options: Any) -> dict[str, torch.Tensor]:
        """One parameter; a list of one tensor, from transformers."""
        values = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: self._part.of(model, name, value) for name, value in values.items()}

"""Adds an adapter to its base's weights and writes the sum as a base of its own, checked before it appears.

    read the adapter as the store reads it -> weight file by weight file, W + scale * B A in float32, rounded once
    -> compare logits with base and adapter apart (merge_parity) -> rename into place

The new base has another digest, so adapters of the old one are refused on it. Knows files; trains nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters_store.base.converted.shards import copy_companions, opened_weights
from adapters_store.base.description import BaseDescription
from adapters_store.base.digests import base_digest
from adapters_store.base.families import HEAD, family_of
from adapters_store.base.files import load_config
from adapters_store.base.folder import CONFIG, INDEX, weight_files
from adapters_store.errors import InputRefused
from adapters_store.filesystem import Filesystem
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.dtypes import TENSOR_TYPES
from adapters_store.format.safetensors_header import TensorEntry
from adapters_store.format.tensor_file import WeightsFile
from adapters_store.format.token_layers import TokenLayer
from adapters_store.format.validate import AdapterPlan, PlannedModule
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from trainer.merge_experts import ExpertSums, ExpertWeight, expert_weights
from trainer.merge_parity import Parity, compare_merged, compare_requantised

RECORD = "multilora_merge.json"
Part = PlannedModule | TokenLayer | ExpertWeight


class MergeRefused(InputRefused):
    """Nothing was written. code: base_is_quantized, merge_not_exact, tied_head, activated_lora, weight_not_found,
    out_exists."""


@dataclass(frozen=True)
class Merged:
    """What was written. name: of the folder. digest: of the new base. dtype: in which the sums are stored."""

    name: str
    digest: str
    base_digest: str
    num_modules: int
    dtype: str
    parity: Parity


def merge(base: Path, adapter: Path, out: Path, *, description: BaseDescription, nf4: bool = False) -> Merged:
    """Merge the PEFT folder `adapter` into the base in `base` and write `out`, which must not exist.

    description: of that base. nf4: the base is served in 4 bits; that is measured and always refused.

    Raises:
        MergeRefused: see there; merge_not_exact carries the measured error.
        AdapterRejected: the adapter does not fit the base. UnsupportedBase. OSError.
    """
    plan = plan_folder(adapter, description)
    _refuse_what_cannot_be_merged(plan, base, out)
    if nf4:
        parity = compare_requantised(base, adapter)
        raise MergeRefused("merge_not_exact", _about_nf4(parity), param="quantize")
    with Filesystem().new_folder(out) as aside:
        dtype, parity = _merge_aside(base, adapter, aside, plan)
        merged = Merged(
            out.name, base_digest(aside), plan.base.digest, len(_parts(plan)) + len(plan.experts), dtype, parity
        )
        (aside / RECORD).write_text(json.dumps(asdict(merged), indent=2) + "\n")
    return merged


def _refuse_what_cannot_be_merged(plan: AdapterPlan, base: Path, out: Path) -> None:
    config = load_config(base)
    if out.exists():
        raise MergeRefused("out_exists", f"--out {out}: exists already", param="out")
    if getattr(config, "quantization_config", None) is not None:
        message = f"--base {base}: its weights are quantised, and a sum would be rounded to them again; merge into the "
        raise MergeRefused("base_is_quantized", f"{message}unquantised base it was made from", param="base")
    if plan.alora_invocation_tokens is not None:
        message = "an activated LoRA leaves the base as it is before its invocation tokens; merged, it would change all"
        raise MergeRefused("activated_lora", message, param="ref")
    tied = [part.name for part in _parts(plan) if isinstance(part, TokenLayer) or part.name == HEAD]
    if tied and config.tie_word_embeddings:
        message = f"the adapter changes {tied[0]}, and {HEAD} is a weight that this base shares with its embeddings: "
        raise MergeRefused("tied_head", f"{message}merging would change both", param="base")


def _merge_aside(base: Path, adapter: Path, aside: Path, plan: AdapterPlan) -> tuple[str, Parity]:
    dtype = _write_weights(base, aside, plan, adapter / WEIGHTS_FILE)
    copy_companions(base, aside)
    for file in filter(Path.is_file, (base / CONFIG, base / INDEX)):
        shutil.copyfile(file, aside / file.name)
    parity = compare_merged(base, adapter, aside, dtype)
    if not parity.holds:
        message = f"the merged {dtype} weights do not answer as base and adapter do: {parity}"
        raise MergeRefused("merge_not_exact", f"{message}. Serve the adapter beside its base instead")
    return dtype, parity


def _parts(plan: AdapterPlan) -> list[PlannedModule | TokenLayer]:
    return [*plan.modules, *plan.token_layers]


def _write_weights(base: Path, aside: Path, plan: AdapterPlan, weights: Path) -> str:
    """Every weight file again, under its own name. Returns the type of the merged weights."""
    waiting: dict[str, Part] = {f"{part.name}.weight": part for part in _parts(plan)}
    with opened_weights(base) as stored:
        waiting |= {part.name: part for part in expert_weights(plan, stored.keys())}
    dtypes: set[torch.dtype] = set()
    transposed = family_of(plan.base.architecture).has_transposed_weights
    with WeightsFile(weights) as adapter:
        sums = ExpertSums(partial(_tensor, adapter))
        for file in weight_files(base):
            dtypes |= _merged_file(file, aside / file.name, waiting, adapter, sums, transposed=transposed)
    if waiting:
        raise MergeRefused("weight_not_found", f"{min(waiting)}: in none of the base's weight files", param="base")
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _merged_file(
    source: Path,
    target: Path,
    waiting: dict[str, Part],
    adapter: WeightsFile,
    sums: ExpertSums,
    *,
    transposed: bool,
) -> set[torch.dtype]:
    """Copies one file with its sums; takes what it found out of `waiting`. Returns the types of the sums."""
    dtypes: set[torch.dtype] = set()
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as stored:
        metadata: Mapping[str, str] | None = stored.metadata()
        for name in stored.keys():  # noqa: SIM118  (no mapping)
            tensors[name] = stored.get_tensor(name)
            part = waiting.pop(name, None)
            if isinstance(part, ExpertWeight):
                tensors[name] = sums(tensors[name], part)
                dtypes.add(tensors[name].dtype)
            elif part is not None:
                is_transposed = transposed and part.name != HEAD and isinstance(part, PlannedModule)
                weight = tensors[name].T if is_transposed else tensors[name]
                merged = _sum(weight, part, adapter)
                tensors[name] = merged.T.contiguous() if is_transposed else merged
                dtypes.add(tensors[name].dtype)
    save_file(tensors, target, metadata=dict(metadata or {"format": "pt"}))
    return dtypes


def _sum(weight: Tensor, part: PlannedModule | TokenLayer, adapter: WeightsFile) -> Tensor:
    """W + scale * B A, its rows as long as DoRA's magnitudes, or the rows that take W's place; in float32, rounded
    once to W's own type."""
    if isinstance(part, PlannedModule):
        a, b = (_tensor(adapter, entry).float() for entry in (part.a, part.b))
        total = torch.addmm(weight.float(), b, a, alpha=part.scale)
        if part.magnitude is not None:
            total *= _tensor(adapter, part.magnitude).float().T / total.norm(dim=1, keepdim=True)
        return total.to(weight.dtype)
    whole_or_a, *rest = (_tensor(adapter, entry).float() for entry in part.entries)
    if not rest:
        return whole_or_a.to(weight.dtype)
    return torch.addmm(weight.float(), whole_or_a.T, rest[0].T, alpha=part.scale).to(weight.dtype)


def _tensor(adapter: WeightsFile, entry: TensorEntry) -> Tensor:
    return torch.from_numpy(adapter.read(entry)).view(TENSOR_TYPES[entry.dtype].torch_dtype)


def _about_nf4(parity: Parity) -> str:
    return (
        "merging into a 4-bit base is not exact: the sum is rounded to NF4 again, which was measured against base and "
        f"adapter apart ({parity}). Serve the adapter beside the NF4 base, or merge into the unquantised base"
    )

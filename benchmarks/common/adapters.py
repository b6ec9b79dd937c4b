"""The benchmarks' adapters: real PEFT files in a real store, and a source that makes many of few.

Every number of an adapter is drawn from N(0, 0.02): about what a trained A has, and B is not zero.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.base.files import describe_base
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from benchmarks.common.shapes import RANK, BenchShape, base_folder, bench_cache
from benchmarks.common.timing import Say
from lora_kernels.background import Later, TimeSlices

STD = 0.02
TENANT = "bench"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, base: BaseDescription, *, rank: int = RANK, seed: int, has_experts: bool = False
) -> Path:
    """A PEFT adapter of this rank on every linear layer of the decoder, and on its experts, as PEFT would save it."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in base.modules.items():
        if name.endswith(TARGETS):
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = _normal(rank, shape.in_features, generator)
            tensors[f"{prefix}.lora_B.weight"] = _normal(shape.out_features, rank, generator)
    for name, stack in base.experts.items() if has_experts else ():
        container, _, parameter = name.rpartition(".")
        prefix = f"base_model.model.{container}{'.base_layer' if parameter == 'gate_up_proj' else ''}"
        tensors[f"{prefix}.lora_A.weight"] = _normal(stack.num_experts * rank, stack.in_features, generator)
        tensors[f"{prefix}.lora_B.weight"] = _normal(stack.out_features, rank * stack.num_experts, generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS[:4] if base.experts else TARGETS),
        **({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if has_experts else {}),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) * STD).to(torch.bfloat16)


@dataclass(frozen=True)
class BenchStore:
    """A real store on disk with published adapters: the i-th has seed i."""

    store: AdapterStore
    base: BaseDescription
    versions: list[AdapterVersion]

    @property
    def digests(self) -> list[AdapterDigest]:
        return [version.digest for version in self.versions]

    def folder(self, index: int) -> Path:
        """The i-th adapter's files, which PEFT reads too."""
        return self.store.weights_of(self.versions[index].digest).parent

    def close(self) -> None:
        self.store.close()


def bench_store(
    shape: BenchShape, count: int, *, say: Say, is_int8: bool = False, has_experts: bool = False, rank: int = RANK
) -> BenchStore:
    """At least `count` adapters in the store of this shape's base; those missing are made and published."""
    base = describe_base(base_folder(shape))
    store = AdapterStore.open(bench_cache() / f"{shape.name}-store")
    if TENANT not in [tenant.name for tenant in store.tenants.list_tenants()]:
        store.tenants.create(TENANT)
    known = {version.name: version for version in store.list_versions(TENANT) if version.base_digest == base.digest}
    form = ("-int8" if is_int8 else "") + ("-experts" if has_experts else "")
    names = [f"r{rank}-{seed:04d}{form}" for seed in range(count)]
    for seed, name in enumerate(names):
        if name not in known:
            with tempfile.TemporaryDirectory(dir=bench_cache()) as scratch:
                folder = write_adapter(Path(scratch), base, rank=rank, seed=seed, has_experts=has_experts)
                known[name] = _publish(store, base, name, folder, is_int8=is_int8)
            if seed % 16 == 15 or seed == count - 1:
                say(f"published adapter {seed + 1} of {count}")
    return BenchStore(store, base, [known[name] for name in names])


def _publish(store: AdapterStore, base: BaseDescription, name: str, folder: Path, *, is_int8: bool) -> AdapterVersion:
    return store.publish(
        tenant=TENANT,
        name=name,
        config=(folder / "adapter_config.json").read_bytes(),
        weights=folder / "adapter_model.safetensors",
        base=base,
        adapter_dtype="int8" if is_int8 else None,
        int8_change=lambda plain, small: 0.0,
    )


def drop_from_page_cache(file: Path) -> None:
    """Let the next read of the file come from the disk, if the system allows it (Linux)."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class AliasedSource:
    """An AdapterSource of any number of adapters over the fewer that a store holds, so that a thousand need no 7 GB.

    Every digest is its own to the engine and takes its own room there. Every load is a real load of a stored adapter:
    read, hashed, checked and packed. Only the numbers inside are shared by every n-th digest.
    """

    fetch = None

    def __init__(self, stored: BenchStore, count: int) -> None:
        self._store = stored.store
        aliases = [AdapterDigest(f"sha256:{hashlib.sha256(b'%d' % index).hexdigest()}") for index in range(count)]
        self._stored_of = {alias: stored.digests[index % len(stored.digests)] for index, alias in enumerate(aliases)}

    @property
    def digests(self) -> list[AdapterDigest]:
        return list(self._stored_of)

    def load_packed(
        self,
        digest: AdapterDigest,
        base: BaseDescription,
        *,
        buffers: HostBuffers | None = None,
        slices: TimeSlices | None = None,
        later: Later = lambda work: work(TimeSlices()),
    ) -> PackedAdapter:
        packed = self._store.load_packed(self._stored_of[digest], base, buffers=buffers, slices=slices, later=later)
        return replace(packed, digest=digest)

    def quarantine_adapter(self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None) -> None:
        self._store.quarantine_adapter(self._stored_of[digest], code, message, tenant=tenant)

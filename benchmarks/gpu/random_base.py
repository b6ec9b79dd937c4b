"""A base with random weights made on the device, and adapters without files: for speed only. Knows shapes.

Needs neither a store nor a download: what a borrowed machine lacks is not missed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from adapters_store.base.description import AdapterDigest, BaseDescription, LinearShape
from adapters_store.base.families import HEAD, family_of
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter, PackedModule
from benchmarks.common.shapes import BenchShape, save_tokenizer
from lora_kernels.check_cases import random_nf4
from lora_kernels.nf4.launcher import nf4_linear, on_nf4_kernel
from lora_kernels.nf4.reference import nf4_dequantize_reference
from lora_kernels.nf4.weight import Nf4Weight
from server.engine.model.attention_hook import register_paged_attention
from server.engine.model.base_model import BaseModel
from server.engine.model.lora_layers import wrap_model
from server.engine.text.tokenizer import Tokenizer

ELEMENT = 2  # bfloat16
MAX_CONTEXT = 65536


def llama_config(shape: BenchShape) -> PretrainedConfig:
    return shape.config(max_position_embeddings=MAX_CONTEXT, tie_word_embeddings=False)


def random_base(shape: BenchShape, device: torch.device, *, nf4: bool) -> BaseModel:
    """bfloat16, or all decoder layers in NF4 with random codes."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            llama_config(shape), dtype=torch.bfloat16, attn_implementation=register_paged_attention()
        )
    model.eval().requires_grad_(False)
    groups = tuple(family_of(["LlamaForCausalLM"]).groups(shape.layers))
    linears = {name: model.get_submodule(name) for group in groups for name in group}
    shapes = {name: LinearShape(linear.in_features, linear.out_features) for name, linear in linears.items()}
    description = BaseDescription("sha256:" + "0" * 64, "random", "LlamaForCausalLM", "bfloat16", shapes, groups)
    if nf4:
        for name, linear_shape in shapes.items():
            if name != HEAD:
                model.set_submodule(name, PackedLinear(linear_shape, device))
    lora = wrap_model(model, description)
    return BaseModel(model, model.config, description, lora, device, torch.bfloat16, quantized=nf4)


class PackedLinear(torch.nn.Module):
    """Stands for bitsandbytes' Linear4bit: the same bytes in the same layout, random."""

    def __init__(self, shape: LinearShape, device: torch.device) -> None:
        super().__init__()
        packed = random_nf4(shape.out_features, shape.in_features, device, on_device=True)
        self.bias = None
        self.weight = torch.nn.Parameter(packed.packed, requires_grad=False)
        outer = SimpleNamespace(blocksize=256, code=packed.nested_code, absmax=packed.nested_absmax)
        state = SimpleNamespace(
            quant_type="nf4",
            blocksize=64,
            shape=(shape.out_features, shape.in_features),
            code=packed.code,
            absmax=packed.absmax,
            nested=True,
            state2=outer,
            offset=packed.nested_offset,
        )
        setattr(self.weight, "quant_state", state)  # noqa: B010  (no attribute that torch declares)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = Nf4Weight.of(self.weight)
        assert packed is not None, "its own layout"
        if on_nf4_kernel(x):
            return nf4_linear(x, [packed], [None])
        return torch.nn.functional.linear(x, nf4_dequantize_reference(packed).to(x.dtype))


def random_tokenizer(vocab: int) -> Tokenizer:
    """A token for every id: the sampler works on as many logits as the model gives."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(vocab, Path(folder))
        return Tokenizer.load(Path(folder))


class RandomAdapters:
    """An adapter source: any number of digests over one pinned buffer of random numbers, or over a file of it.

    file: read anew at every load, as a store's packed blob is.
    """

    fetch = None

    def __init__(self, base: BaseModel, rank: int, *, file: Path | None = None) -> None:
        self._modules, size = packed_layout(base.description, rank)
        self._buffer = torch.randn(size).mul_(0.02).to(torch.bfloat16)
        if base.device.type == "cuda":
            self._buffer = self._buffer.pin_memory()
        self._file = file
        if file is not None:
            self._buffer.view(torch.int16).numpy().tofile(file)

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * ELEMENT

    def digest(self, name: str) -> AdapterDigest:
        return AdapterDigest(f"sha256:{name}")

    def load_packed(
        self,
        digest: AdapterDigest,
        base: BaseDescription,
        *,
        buffers: HostBuffers | None = None,
        slices: object = None,
        later: object = None,
    ) -> PackedAdapter:
        """Raises OSError if the file cannot be read."""
        if self._file is None:
            return PackedAdapter(digest, self._buffer, self._modules)
        buffer = (buffers or HostBuffers()).take(self._buffer.numel(), torch.bfloat16)
        with self._file.open("rb") as stream:
            num_read = stream.readinto(buffer.view(torch.uint8).numpy().data)
        assert num_read == self.num_bytes, f"{self._file} holds {num_read} of {self.num_bytes} bytes"
        return PackedAdapter(digest, buffer, self._modules)

    def quarantine_adapter(self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None) -> None:
        raise RuntimeError(f"{digest} made numbers that are not finite: {code}: {message}")


def packed_layout(base: BaseDescription, rank: int) -> tuple[tuple[PackedModule, ...], int]:
    """All decoder layers at one rank, in the order of `adapters_store.packed.packing`; and the buffer's length."""
    modules: list[PackedModule] = []
    end = 0
    for group in base.groups:
        if group == (HEAD,):
            continue
        offsets = []
        for side in ("in_features", "out_features"):
            for name in group:
                offsets.append(end)
                end += -(-rank * getattr(base.modules[name], side) * ELEMENT // ALIGN_BYTES) * (ALIGN_BYTES // ELEMENT)
        half = len(group)
        modules += [
            PackedModule(name, rank, 2.0, offsets[index], offsets[half + index]) for index, name in enumerate(group)
        ]
    return tuple(modules), end

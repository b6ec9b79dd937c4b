"""The base's linear weights as they are served, read from its files one layer at a time. Knows files; no adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD, family_of
from adapters_store.base.files import load_config
from adapters_store.base.folder import weight_files
from adapters_store.base.nf4 import dequantized, nf4_rounded
from adapters_store.base.token_weights import weights_are_there
from adapters_store.errors import AdapterUnavailable


class BaseWeights:
    """lies_in: which open file holds each tensor."""

    def __init__(self, base: BaseDescription, lies_in: Mapping[str, Any]) -> None:
        self._base = base
        self._lies_in = lies_in
        self._family = family_of(base.architecture)

    def of(self, module: str) -> torch.Tensor:
        """[out_features, in_features], with the values that the server multiplies by: rounded to its type, and to NF4
        and back where it holds NF4. A head that is tied to the embedding is the embedding.

        Raises AdapterUnavailable (base_weights_missing) if the files hold no such weight.
        """
        shape = self._base.modules[module]
        name = self._name_of(module)
        weight: torch.Tensor = self._lies_in[name].get_tensor(name)
        if weight.dtype is torch.uint8:
            about = {key: file.get_tensor(key) for key, file in self._lies_in.items() if key.startswith(f"{name}.")}
            weight = dequantized(weight, about)
        elif self._family.has_transposed_weights and module != HEAD:
            weight = weight.T
        weight = weight.to(getattr(torch, self._base.dtype))
        if self._base.nf4 and module != HEAD:
            weight = nf4_rounded(weight.contiguous())
        assert weight.shape == (shape.out_features, shape.in_features), f"{name}: {list(weight.shape)}"
        return weight

    @property
    def _is_tied(self) -> bool:
        return bool(load_config(Path(str(self._base.folder))).tie_word_embeddings)

    def _name_of(self, module: str) -> str:
        """Files of some bases lack the name of the whole model ("h.0.attn.c_attn")."""
        if module == HEAD and f"{HEAD}.weight" not in self._lies_in and self._is_tied:
            module = self._family.embedding
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        found = next((name for name in names if name in self._lies_in), None)
        if found is None:
            raise _missing(self._base, f"hold no weight of {module}")
        return found


@contextmanager
def base_weights(base: BaseDescription) -> Iterator[BaseWeights]:
    """Raises AdapterUnavailable (base_weights_missing) if the files are not those of the base. OSError."""
    if not weights_are_there(base):
        raise _missing(base, "are not there, or have changed since it was described")
    with ExitStack() as stack:
        lies_in: dict[str, Any] = {}
        for path in weight_files(Path(str(base.folder))):
            file = stack.enter_context(safe_open(path, framework="pt"))
            lies_in |= dict.fromkeys(file.keys(), file)
        yield BaseWeights(base, lies_in)


def _missing(base: BaseDescription, what: str) -> AdapterUnavailable:
    message = (
        f"use_dora: the norms of the base's weights are needed, and the files of {base.name} in {base.folder} {what}"
    )
    return AdapterUnavailable("base_weights_missing", message)

"""Puts adapters into the token embedding: rows of their own, or LoRA. Knows one step's adapters; knows no requests."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.lora.token_rows import embed_own_rows
from server.engine.model.lora_layers import LoraState


class AdapterEmbedding(nn.Module):
    """Replaces the base's token embedding."""

    def __init__(self, base: nn.Module, state: LoraState) -> None:
        super().__init__()
        self.base = base
        self._state = state
        scale = getattr(base, "embed_scale", None)  # Gemma's embedding multiplies its rows
        self._scale = 1.0 if scale is None else float(scale.to(base.get_parameter("weight").dtype))

    @property
    def num_embeddings(self) -> int:
        return int(self.base.num_embeddings)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The base's own rows."""
        return self.base.get_parameter("weight")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [..., T]. Returns [..., T, H]."""
        embedded: torch.Tensor = self.base(ids)
        batch = self._state.layers
        if batch is not None and batch.token_segments:
            rows_TH = embedded.view(-1, embedded.shape[-1])
            ids_T, segments, arena = ids.reshape(-1), batch.token_segments, batch.table.arena
            embed_own_rows(rows_TH, ids_T, segments, arena, vocabulary=self.num_embeddings, scale=self._scale)
        return embedded

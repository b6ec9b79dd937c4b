"""An adapter's own embedding and head: rows of its own in place of the base's, or LoRA on the embedding.

Plain torch, one product for each adapter of the step that has any: few have. Knows the arena; knows no models.
Legend: V vocabulary, H hidden size, T tokens, R rows of one adapter, K rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Where one adapter's own embedding or head lies, in elements of the arena.

    rank 0: the whole weight, [V, H] at a_offset. Else the embedding's LoRA: A transposed, [V, K] at a_offset, and B
    transposed, [K, H] at b_offset, times scale.
    """

    is_head: bool
    rank: int
    scale: float
    a_offset: int
    b_offset: int

    def moved(self, num_elements: int) -> TokenRows:
        """The same for an adapter that starts at `num_elements`."""
        return replace(self, a_offset=self.a_offset + num_elements, b_offset=self.b_offset + num_elements)


Segments = Sequence[tuple[torch.Tensor, TokenRows]]


def embed_own_rows(
    embedded_TH: torch.Tensor,
    ids_T: torch.Tensor,
    segments: Segments,
    arena: torch.Tensor,
    *,
    vocabulary: int,
    scale: float,
) -> None:
    """Write the embeddings of each adapter's own rows over the base's, or add their LoRA, in place.

    scale: what the base's embedding multiplies its rows by (Gemma).
    """
    hidden = embedded_TH.shape[1]
    for rows_R, own in segments:
        if own.is_head:
            continue
        width = own.rank or hidden
        found_RW = matrix(arena, own.a_offset, vocabulary, width)[ids_T[rows_R]]
        if own.rank == 0:
            embedded_TH[rows_R] = found_RW * scale
            continue
        b_KH = matrix(arena, own.b_offset, own.rank, hidden).float()
        delta_RH = found_RW.float() @ b_KH * (own.scale * scale)
        embedded_TH[rows_R] = (embedded_TH[rows_R].float() + delta_RH).to(embedded_TH.dtype)


def matrix(arena: torch.Tensor, offset: int, rows: int, cols: int) -> torch.Tensor:
    """[rows, cols], as it lies in the arena."""
    return arena[offset : offset + rows * cols].view(rows, cols)

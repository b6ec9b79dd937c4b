"""What a forward keeps for its backward, in bytes: the layers' activations and the loss. Knows shapes and precisions.

Counted from what autograd saves in transformers' decoder layers with SDPA (no [T, T] scores are kept), tensor by
tensor; the method is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), the terms are of gated MLPs and
grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.planner.shapes import ModelShape

LOGIT_COPIES = 3  # a chunk of logits, its float32 softmax and its gradient


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a forward leaves behind. layer_bytes: one layer, whole. boundary_bytes: a layer's input alone."""

    layer_bytes: int
    boundary_bytes: int
    loss_bytes: int

    def total(self, layers: int, *, checkpointing: bool) -> int:
        """At the peak. With checkpointing every layer keeps its input, and one layer at a time is computed again."""
        if checkpointing:
            return layers * self.boundary_bytes + self.layer_bytes + self.loss_bytes
        return layers * self.layer_bytes + self.loss_bytes


def kept_by_forward(
    shape: ModelShape, tokens: int, *, precision: str, trains_base: bool, targets: Iterable[str], rank: int, chunk: int
) -> Kept:
    """targets: last names of the layers with adapters. chunk: rows of logits alive at once."""
    mixed = precision != "float32"
    per_token = _layer_bytes(shape, mixed=mixed, trains_base=trains_base, targets=tuple(targets), rank=rank)
    residual = shape.hidden * (2 if mixed and not trains_base else 4)
    rows = min(chunk, tokens)
    logits = LOGIT_COPIES * rows * shape.vocab * 4
    final = 3 * tokens * shape.hidden * 4  # the last norm, the rows that the head reads, and their gradient
    head = 2 * shape.vocab * shape.hidden * 4 if trains_base else 0  # the head's gradient, and one chunk's part of it
    return Kept(tokens * per_token, tokens * residual, logits + final + head)


def _layer_bytes(shape: ModelShape, *, mixed: bool, trains_base: bool, targets: tuple[str, ...], rank: int) -> int:
    """Per token. Norms are computed in float32; in mixed precision each linear layer that trains keeps its own cast."""
    element = 2 if mixed else 4
    h, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm = shape.norms * (4 * h + 4)
    if shape.qk_norm:
        norm += 4 * (query + key + shape.heads + shape.kv_heads)
    if trains_base:
        norm += shape.norms * 4 * h + 4 * (query + key) * shape.qk_norm  # their weights train: the normalised rows, too
    attention = element * (2 * query + 2 * key) + 4 * shape.heads  # q, k, v, the result and a log-sum-exp a head
    if shape.fused:
        attention += element * (query + key)  # v is a view that keeps the whole product alive
    mlp = element * 3 * shape.intermediate  # gate, its activation, up
    return norm + attention + mlp + _inputs(shape, mixed, trains_base, targets, element) + element * rank * len(targets)


def _inputs(shape: ModelShape, mixed: bool, trains_base: bool, targets: tuple[str, ...], element: int) -> int:
    """What linear layers keep of their inputs: shared in float32, cast by each one in mixed precision."""
    trained = tuple(shape.linears) if trains_base else targets
    kept = 0
    for group in (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")):
        members = sum(name in trained for name in group)
        kept += element * shape.hidden * (members if mixed else min(members, 1))
    if "o_proj" in trained:  # beside the result that attention keeps itself
        kept += element * shape.heads * shape.head_dim
    if "down_proj" in trained:
        kept += element * shape.intermediate
    return kept

"""Cross-entropy over supervised tokens alone, in chunks. Knows hidden rows and a head; knows no model and no batch.

Legend: N supervised tokens, H hidden size, V vocabulary, C rows of a chunk. The N x V logits never exist at once: each
chunk's gradient is taken as soon as its loss is known, so the head runs forward and backward once and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.data.types import IGNORED

CHUNK_LOGITS = 1 << 22  # C * V: 16 MiB of float32 logits
Head = Callable[[Tensor], Tensor]


def supervised_rows(labels: Tensor) -> Tensor:
    """labels [1, T], aligned with the input -> indices [N] of the rows whose next token is learned."""
    return torch.nonzero(labels[0, 1:] != IGNORED).flatten()


def summed_cross_entropy(
    hidden_NH: Tensor, head: Head, labels_N: Tensor, weights_N: Tensor, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """Sum of weight x nll in nats, float32 scalar, differentiable in hidden_NH and in `parameters`.

    head: rows [C, H] to logits [C, V]. parameters: the head's own that require a gradient (none for a frozen head).
    """
    if torch.is_grad_enabled():
        loss: Tensor = _ChunkedLoss.apply(hidden_NH, head, labels_N, weights_N, *parameters)  # type: ignore[no-untyped-call]
        return loss
    losses = [_loss(head, *chunk) for chunk in _chunks(hidden_NH, head, labels_N, weights_N)]
    return torch.stack(losses).sum() if losses else weights_N.sum()


def row_losses(hidden_NH: Tensor, head: Head, labels_N: Tensor) -> Tensor:
    """The nll of each row in nats, float32 [N], differentiable in hidden_NH; the head must be frozen."""
    ones_N = torch.ones(len(labels_N), device=hidden_NH.device)
    if torch.is_grad_enabled():
        losses: Tensor = _RowLosses.apply(hidden_NH, head, labels_N, ones_N)  # type: ignore[no-untyped-call]
        return losses
    parts = [_row_losses(head, hidden, labels) for hidden, labels, _ in _chunks(hidden_NH, head, labels_N, ones_N)]
    return torch.cat(parts) if parts else ones_N


def _chunks(hidden_NH: Tensor, head: Head, labels_N: Tensor, weights_N: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if len(hidden_NH) == 0:
        return
    with torch.no_grad():
        vocabulary = head(hidden_NH[:1]).shape[1]
    rows = max(CHUNK_LOGITS // vocabulary, 1)
    yield from zip(hidden_NH.split(rows), labels_N.split(rows), weights_N.split(rows), strict=True)


def _loss(head: Head, hidden_CH: Tensor, labels_C: Tensor, weights_C: Tensor) -> Tensor:
    return torch.dot(_row_losses(head, hidden_CH, labels_C), weights_C)


def _row_losses(head: Head, hidden_CH: Tensor, labels_C: Tensor) -> Tensor:
    return cross_entropy(head(hidden_CH).float(), labels_C, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is linear in what comes from above, a scalar: so it is taken on the way forward and scaled later."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head: Head, labels_N: Tensor, weights_N: Tensor, *params: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.zeros_like(hidden_NH)
        grads = [torch.zeros_like(parameter) for parameter in params]
        start = 0
        for hidden_CH, labels_C, weights_C in _chunks(hidden_NH, head, labels_N, weights_N):
            with torch.enable_grad():
                leaf_CH = hidden_CH.detach().requires_grad_()
                loss = _loss(head, leaf_CH, labels_C, weights_C)
            grad_CH, *more = torch.autograd.grad(loss, [leaf_CH, *params])
            grad_NH[start : start + len(grad_CH)] = grad_CH
            for index, part in enumerate(more):
                grads[index] += part
            total += loss.detach()
            start += len(grad_CH)
        ctx.save_for_backward(grad_NH, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        grad_NH, *grads = ctx.saved_tensors
        (scale,) = above
        return (grad_NH * scale.to(grad_NH.dtype), None, None, None, *(grad * scale.to(grad.dtype) for grad in grads))


class _RowLosses(torch.autograd.Function):
    """A row's loss depends on its own hidden row alone, so what comes from above may be a factor for each row."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head: Head, labels_N: Tensor, ones_N: Tensor) -> Tensor:
        losses, grads = [ones_N[:0]], [torch.zeros_like(hidden_NH[:0])]
        for hidden_CH, labels_C, _ in _chunks(hidden_NH, head, labels_N, ones_N):
            with torch.enable_grad():
                leaf_CH = hidden_CH.detach().requires_grad_()
                nll_C = _row_losses(head, leaf_CH, labels_C)
                total = nll_C.sum()
            grads += torch.autograd.grad(total, [leaf_CH])
            losses.append(nll_C.detach())
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        (above_N,) = above
        return grad_NH * above_N[:, None].to(grad_NH.dtype), None, None, None

"""One parameter of a layer's experts: an adapter's tensors -> A and B of each expert. Knows arrays, and no files.

Legend: X experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adapters_store.base.description import ExpertsShape
from adapters_store.format.dtypes import Bits
from adapters_store.format.experts.plan import PlannedExperts
from adapters_store.format.safetensors_header import TensorEntry


def joined(stack: PlannedExperts, shape: ExpertsShape, read: Callable[[TensorEntry], Bits]) -> tuple[Bits, Bits]:
    """A [X, R, I] and B transposed, [X, R, O]. read: a tensor's bits [rows, columns], of one type for all; called for
    A, then B, part by part. Where several layers are joined, each has ranks of its own, and B is zero elsewhere."""
    experts, rank = shape.num_experts, stack.rank
    whole = stack.parts[0]
    if whole.expert is None:
        a_XRI, b_OE = read(whole.a).reshape(experts, rank, shape.in_features), read(whole.b)
        return a_XRI, b_OE.reshape(shape.out_features, rank, experts).transpose(2, 1, 0)
    first = read(whole.a), read(whole.b)
    a_XRI, b_XRO = (
        np.zeros((experts, rank, width), first[0].dtype) for width in (shape.in_features, shape.out_features)
    )
    for part in stack.parts:
        a_PI, b_QP = first if part is whole else (read(part.a), read(part.b))
        ranks = slice(part.first_rank, part.first_rank + len(a_PI))
        a_XRI[part.expert, ranks] = a_PI
        b_XRO[part.expert, ranks, part.first_output : part.first_output + len(b_QP)] = b_QP.T
    return a_XRI, b_XRO

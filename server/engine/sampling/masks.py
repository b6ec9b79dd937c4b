"""Which tokens the constraints of a batch allow next, computed beside the forward. Knows constraints; knows no grammar.

The state after a request's last token is known before the forward that reads it. So on a CPU, where the engine's thread
works through the forward, another thread computes the masks meanwhile. C constrained requests, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from server.engine.request import MaskSource, Request, TokenConstraint

_Wanted = list[tuple[TokenConstraint, int]]  # constraints, and how many tokens each has read


def one_by_one(constraints: Sequence[TokenConstraint]) -> NDArray[np.uint8]:
    """A `MaskSource` for constraints of any kind."""
    return np.stack([constraint.allowed() for constraint in constraints])


class Masks:
    """Owned by the engine's thread. Between `begin` and `take` nothing else may use these requests' constraints."""

    def __init__(self, source: MaskSource = one_by_one) -> None:
        self._source = source
        self._thread: ThreadPoolExecutor | None = None
        self._begun: tuple[_Wanted, Future[torch.Tensor]] | None = None

    def begin(self, requests: Sequence[Request]) -> None:
        """These are sampled next: compute their masks until `take` asks for them."""
        self._begun_ended()
        wanted = _read(requests)
        if wanted:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="token-masks")
            self._begun = wanted, self._thread.submit(self._computed, wanted)

    def take(self, requests: Sequence[Request]) -> torch.Tensor:
        """Of the requests with a constraint, in order: [C, bytes], uint8, on the host."""
        begun = self._begun_ended()
        wanted = _read(requests)
        return begun[1].result() if begun is not None and begun[0] == wanted else self._computed(wanted)

    def _computed(self, wanted: _Wanted) -> torch.Tensor:
        return torch.from_numpy(self._source([constraint for constraint, _ in wanted]))

    def _begun_ended(self) -> tuple[_Wanted, Future[torch.Tensor]] | None:
        """What was begun, possibly for a forward that failed; None: nothing was."""
        begun, self._begun = self._begun, None
        if begun is not None:
            wait([begun[1]])
        return begun


def _read(requests: Sequence[Request]) -> _Wanted:
    """Their constraints, each having read its request's output."""
    wanted = []
    for request in requests:
        if request.constraint is not None:
            request.constraint.advance(request.output_ids)
            wanted.append((request.constraint, len(request.output_ids)))
    return wanted

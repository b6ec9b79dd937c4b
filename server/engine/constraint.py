"""What may limit the tokens of a request: the seam between a grammar and the steps of the engine. Knows no grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # `multilora --help` imports what requests are, and no numpy
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ConstraintFailure:
    """Why a constraint cannot continue. code and message go to the client; neither quotes what the client sent."""

    code: str
    message: str
    status: int = 400


class TokenConstraint(Protocol):
    """Says which token may follow the output so far. One per request; after submission only the engine's thread uses
    it. No method raises for what a client or a model did: see `failure`."""

    def advance(self, output_ids: Sequence[int]) -> None:
        """Read the request's output so far. What was read before is not read again."""

    def allowed(self) -> NDArray[np.uint8]:
        """One bit for each token id, the lowest id in the lowest bit: 1 if it may be next. At least V bits, rounded up
        to whole bytes. All bits are set after a failure. The array is valid until the next call."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow: the output read so far is whole."""

    @property
    def failure(self) -> ConstraintFailure | None:
        """Set once it cannot continue; then it stays."""


MaskSource = Callable[[Sequence[TokenConstraint]], "NDArray[np.uint8]"]
"""`allowed` of several constraints at once, [C, bytes]. Called on one thread at a time, which may be any."""

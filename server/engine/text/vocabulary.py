"""Which token ids a base can read and write: those with an embedding row in the model and a token in the tokenizer.

The two rarely agree. A model is often wider than its tokenizer (padding rows), a tokenizer may be wider than its model
(a token added without resizing), and ids below the highest may have no token. Knows ids; knows no text and no request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adapters_store.parsing.strict_json import shown
from lora_kernels.transfer import to_device
from server.engine.request import InvalidRequest


class Vocabulary:
    """num_rows: of the embedding. ids_by_token: the tokenizer's, added tokens included.

    size: one more than the highest id served. holes: lower ids without a token. unread: tokens without a row, by id.
    Raises ValueError if no id is served.
    """

    def __init__(self, num_rows: int, ids_by_token: Mapping[str, int]) -> None:
        known = {id_ for id_ in ids_by_token.values() if 0 <= id_ < num_rows}
        if not known:
            raise ValueError(f"none of the tokenizer's {len(ids_by_token)} tokens has one of the {num_rows} rows")
        self.size = 1 + max(known)
        self.holes = frozenset(range(self.size)) - known
        self.unread = {id_: token for token, id_ in ids_by_token.items() if id_ >= num_rows}
        self._num_rows = num_rows
        self._hole_ids_H = torch.tensor(sorted(self.holes), dtype=torch.int64)

    def check(self, ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for an id that is not served."""
        if not ids or (min(ids) >= 0 and max(ids) < self.size and self.holes.isdisjoint(ids)):
            return
        bad = next(id_ for id_ in ids if not 0 <= id_ < self.size or id_ in self.holes)
        if bad in self.unread:
            why = f"is {self.unread[bad]!r}, for which the model has no embedding row (it has {self._num_rows})"
        elif bad in self.holes:
            why = "has no token in this model's tokenizer"
        else:
            why = f"is not in [0, {self.size})"
        raise InvalidRequest(field, f"{field}: token id {shown(bad)} {why}")

    def served_logits(self, logits_RW: torch.Tensor) -> torch.Tensor:
        """Logits [R, size]: columns beyond are cut off, holes are overwritten with -inf, in place.

        logits_RW: [R, W], the model's own.
        """
        logits_RV = logits_RW[:, : self.size]
        if self.holes:
            if self._hole_ids_H.device != logits_RV.device:
                self._hole_ids_H = to_device(self._hole_ids_H, logits_RV.device)
            logits_RV.index_fill_(1, self._hole_ids_H, -torch.inf)
        return logits_RV

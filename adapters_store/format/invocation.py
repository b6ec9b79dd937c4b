"""Where the tokens that switch an activated LoRA on stand in a prompt. Knows token ids; knows no text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_ITEM_BYTES = array("I").itemsize


def last_place(token_ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` begins for the last time in `token_ids`; None if it is not there."""
    whole, part = array("I", token_ids).tobytes(), array("I", wanted).tobytes()
    end = len(whole)
    while (found := whole.rfind(part, 0, end)) >= 0:
        if found % _ITEM_BYTES == 0:
            return found // _ITEM_BYTES
        end = found + len(part) - 1
    return None

"""From where on an adapter changes a prompt. Knows token ids; knows no text."""

from __future__ import annotations

from collections.abc import Sequence

from adapters_store.format.invocation import last_place
from adapters_store.parsing.strict_json import shown
from server.api.target import Target
from server.engine.request import InvalidRequest


def active_from_in(prompt: Sequence[int], target: Target, field: str) -> int:
    """The position of the first token that the adapter changes: 0, or where an activated LoRA's tokens begin.

    As PEFT does, the last place of the tokens counts. PEFT lets the base answer a prompt without them; that would hide
    a mistake. field: the prompt's, in the request's body.

    Raises InvalidRequest (invocation_missing).
    """
    if target.invocation_tokens is None:
        return 0
    found = last_place(prompt, target.invocation_tokens)
    if found is None:
        wanted = shown(list(target.invocation_tokens))
        message = (
            f"{field} must hold the tokens that switch the adapter {shown(target.model)} on (alora_invocation_tokens: "
            f"{wanted}); for an answer without it ask the base model"
        )
        raise InvalidRequest(field, message, code="invocation_missing")
    return found

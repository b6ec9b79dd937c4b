"""Mistral: a JSON list after [TOOL_CALLS] (tokenizers v2 to v7), or name and arguments after it (from v11 on).

Source: mistral-common's instruct tokenizers, and the chat templates of Mistral-7B-Instruct-v0.3 and
Mistral-Small-3.2-24B-Instruct.
"""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect, Marker, Maybe

_CALLS, _ARGS = Marker("[TOOL_CALLS]"), Marker("[ARGS]")

MISTRAL = Dialect(
    name="mistral",
    begin=(_CALLS, Maybe(" "), "["),
    between=(", ",),
    end=("]",),
    template_words=("tools", "[TOOL_CALLS]"),
    foreign_words=("[ARGS]",),
    in_first_user_turn=True,
    call_id_chars=9,
)

MISTRAL_ARGS = Dialect(
    name="mistral_args",
    begin=(_CALLS,),
    opening=(),
    middle=(_ARGS,),
    closing=(),
    between=(_CALLS,),
    template_words=("tools", "[TOOL_CALLS]", "[ARGS]"),
    in_first_user_turn=True,
    call_id_chars=9,
)

"""Phi-4-mini: a JSON list between <|tool_call|> and <|/tool_call|>; tools between <|tool|> and <|/tool|>.

Source: the model card of microsoft/Phi-4-mini-instruct.
"""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect, Marker

PHI = Dialect(
    name="phi",
    begin=(Marker("<|tool_call|>"), "["),
    between=(", ",),
    end=("]", Marker("<|/tool_call|>")),
    instructions="You may call the tools below as {form}.\n<|tool|>{tools}<|/tool|>",
    result="<|tool_response|>{content}",
)

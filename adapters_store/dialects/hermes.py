"""Hermes, Qwen 2.5 and 3, SmolLM2: each call between <tool_call> and </tool_call>.

Source: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5-Instruct.
"""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect, Marker

_OPEN, _CLOSE = Marker("<tool_call>"), Marker("</tool_call>")

HERMES = Dialect(
    name="hermes",
    begin=(_OPEN, "\n"),
    between=("\n", _CLOSE, "\n", _OPEN, "\n"),
    end=("\n", _CLOSE),
    template_words=("tools", "<tool_call>", "arguments"),
    foreign_words=("<function=", "<arg_key>", "<\uff5ctool"),
    instructions="You may call one or more functions. For each call, write\n{form}\nThe functions' signatures:",
    result="<tool_response>\n{content}\n</tool_response>",
)

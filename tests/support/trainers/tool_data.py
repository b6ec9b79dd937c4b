"""Training lines with tools: what they say, and chat templates that show tools themselves or do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

FORECAST: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "The weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"enum": ["metric", "imperial"]},
                "place": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [FORECAST, NOW]
QWEN = (  # of Qwen2.5: tools in the system turn, calls and results between marks, results of a turn together
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{%- endif %}{{ '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{%- endfor %}"
    '{{ \'\n</tools>\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\' }}'
    "{{ '<|end_of_turn|>\n' }}{%- elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|end_of_turn|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end_of_turn|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>' + m.role }}"
    "{%- if m.content %}{{ '\n' + m.content }}{%- endif %}"
    '{%- for call in m.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{%- endfor %}{{ '<|end_of_turn|>\n' }}"
    "{%- elif m.role == 'tool' %}{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{%- endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|end_of_turn|>\n' }}{%- endif %}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
DROPS_TEXT = QWEN.replace("{%- if m.content %}{{ '\n' + m.content }}{%- endif %}", "")


def call(name: str, arguments: dict[str, Any], id_: str = "call_1") -> dict[str, Any]:
    """As OpenAI's files spell it: without blanks."""
    function = {"name": name, "arguments": json.dumps(arguments, separators=(",", ":"))}
    return {"id": id_, "type": "function", "function": function}


def calling(*calls: dict[str, Any], content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(content: str, id_: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


def line(*turns: dict[str, Any] | str, tools: Sequence[dict[str, Any]] = TOOLS, **more: Any) -> dict[str, Any]:
    """A text is what the user says."""
    messages = [{"role": "user", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    return {"messages": messages, "tools": list(tools), **more}

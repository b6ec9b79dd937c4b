"""What Anthropic's own client does: messages whole and streamed, a tool with its result, token counts, errors."""

from __future__ import annotations

import os

import anthropic

URL, KEY, MODEL = (os.environ[name] for name in ("CLIENT_URL", "CLIENT_KEY", "CLIENT_MODEL"))
QUESTION = [{"role": "user", "content": "Who pays for repairs?"}]
REPAIR = {
    "name": "repair",
    "input_schema": {
        "type": "object",
        "properties": {"days": {"enum": [1, 2, 30]}},  # the demo base writes a free integer without end
        "required": ["days"],
        "additionalProperties": False,
    },
}
client = anthropic.Anthropic(base_url=URL.removesuffix("/v1"), api_key=KEY, max_retries=0)

whole = client.messages.create(
    model=MODEL, max_tokens=40, messages=QUESTION, system="Be brief.", extra_body={"temperature": 0}
)
text = whole.content[0].text
assert text
assert whole.usage.output_tokens > 0
with client.messages.stream(
    model=MODEL, max_tokens=40, messages=QUESTION, system="Be brief.", extra_body={"temperature": 0}
) as stream:
    assert "".join(stream.text_stream) == text
    assert stream.get_final_message().stop_reason == whole.stop_reason
called = client.messages.create(
    model=MODEL,
    max_tokens=200,
    messages=QUESTION,
    tools=[REPAIR],
    tool_choice={"type": "tool", "name": "repair", "disable_parallel_tool_use": True},
    extra_body={"temperature": 0},
)
[call] = called.content
assert (call.type, call.name, called.stop_reason) == ("tool_use", "repair", "tool_use")
assert isinstance(call.input["days"], int)
history = [
    *QUESTION,
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "done"}]},
]
after = client.messages.create(model=MODEL, max_tokens=20, messages=history, tools=[REPAIR])
counted = client.messages.count_tokens(model=MODEL, messages=history, tools=[REPAIR])
assert after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0) == counted.input_tokens
try:
    client.messages.create(model="none", max_tokens=5, messages=QUESTION)
    raise AssertionError("an unknown model was answered")
except anthropic.NotFoundError as error:
    print(f"refused as it should be: {error.body['error']['type']}")
print("messages, stream, tool, result, count_tokens, error")

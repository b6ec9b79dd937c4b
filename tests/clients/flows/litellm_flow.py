"""What litellm does with an OpenAI-compatible server, called directly and as a router between two of its models."""

from __future__ import annotations

import asyncio
import json
import os

import litellm

URL, KEY, MODEL, BASE = (os.environ[name] for name in ("CLIENT_URL", "CLIENT_KEY", "CLIENT_MODEL", "CLIENT_BASE"))
QUESTION = [{"role": "user", "content": "Who pays for repairs?"}]
TO = {"api_base": URL, "api_key": KEY}

whole = litellm.completion(model=f"openai/{MODEL}", messages=QUESTION, temperature=0, **TO)
text = whole.choices[0].message.content
assert text
assert whole.usage.total_tokens > 0
pieces = litellm.completion(
    model=f"openai/{MODEL}", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}, **TO
)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
plain = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Hello", max_tokens=5, **TO)
assert plain.choices[0].text
later = asyncio.run(litellm.acompletion(model=f"openai/{MODEL}", messages=QUESTION, temperature=0, **TO))
assert later.choices[0].message.content == text
try:
    litellm.completion(model="openai/none", messages=QUESTION, num_retries=0, **TO)
    raise AssertionError("an unknown model was answered")
except litellm.NotFoundError as error:
    print(f"refused as it should be: {type(error).__name__}")
router = litellm.Router(
    [
        {"model_name": name, "litellm_params": {"model": f"openai/{target}", **TO}}
        for name, target in (("lawyer", MODEL), ("plain", BASE))
    ]
)
assert router.completion(model="lawyer", messages=QUESTION, temperature=0).choices[0].message.content == text
REPAIR = {
    "type": "function",
    "function": {
        "name": "repair",
        "parameters": {
            "type": "object",
            "properties": {"days": {"enum": [1, 2, 30]}},  # the demo base writes a free integer without end
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
called = litellm.completion(
    model=f"openai/{MODEL}", messages=QUESTION, temperature=0, tools=[REPAIR], tool_choice="required", **TO
)
call = called.choices[0].message.tool_calls[0]
assert call.function.name == "repair"
assert isinstance(json.loads(call.function.arguments)["days"], int)
claude = litellm.completion(
    model=f"anthropic/{MODEL}", messages=QUESTION, max_tokens=20, api_base=URL.removesuffix("/v1"), api_key=KEY
)
assert claude.choices[0].message.content
print("completion, stream, text_completion, acompletion, error, router, tool, anthropic")

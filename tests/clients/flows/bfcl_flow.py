"""BFCL's syntax check (its AST checker, unchanged) of calls that the server makes.

First its own questions and functions, simple, multiple, parallel and both. The demo's agent never saw them, so values
are not judged: every call must name a function, have its required arguments, no others, and each of its type. Then what
the demo's agents learned, in BFCL's form: values are judged too.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

handlers = types.ModuleType("bfcl_eval.constants.model_config")  # its own imports every vendor's client
handlers.MODEL_CONFIG_MAPPING = {"multilora": types.SimpleNamespace(underscore_to_dot=True)}
sys.modules[handlers.__name__] = handlers

from bfcl_eval.constants.enums import Language, ModelStyle  # noqa: E402
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402
from bfcl_eval.model_handler.utils import convert_to_tool  # noqa: E402
from bfcl_eval.utils import is_function_calling_format_output, load_dataset_entry  # noqa: E402

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
NUM_EACH, NUM_AT_ONCE, MAX_TOKENS = 20, 8, 256
KEYS = json.loads(os.environ["CLIENT_AGENT_KEYS"])
CLIENTS = {tenant: openai.OpenAI(base_url=os.environ["CLIENT_URL"], api_key=key) for tenant, key in KEYS.items()}


def function(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": list(arguments)}}


DESK = [function("book_meeting", "client", "day"), function("find_key", "room")]
WARD = [function("note_sign", "patient", "sign"), function("find_bed", "ward")]
AGENTS = [
    (
        "desk",
        DESK,
        "Book a meeting with Laura on Thursday.",
        {"book_meeting": {"client": ["Laura"], "day": ["Thursday"]}},
    ),
    ("desk", DESK, "I need the key of the garden.", {"find_key": {"room": ["garden"]}}),
    ("ward", WARD, "Note cough for Oscar.", {"note_sign": {"patient": ["Oscar"], "sign": ["cough"]}}),
    ("ward", WARD, "A bed in the heart ward, please.", {"find_bed": {"ward": ["heart"]}}),
]


def called(tenant: str, functions: list[Any], messages: list[Any], **fields: Any) -> tuple[str, list[Any]]:
    """The finish reason, and the calls as BFCL's handler of OpenAI's clients reads them."""
    tools = convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS)
    ask = CLIENTS[tenant].chat.completions.create
    [choice] = ask(model="agent", messages=messages, tools=tools, max_tokens=MAX_TOKENS, **fields).choices
    if choice.finish_reason == "length":
        return "length", []
    calls = [{call.function.name: json.loads(call.function.arguments)} for call in choice.message.tool_calls or ()]
    assert is_function_calling_format_output(calls), calls
    return choice.finish_reason, calls


def possible(functions: list[Any], call: dict[str, Any]) -> dict[str, Any]:
    """This call as BFCL's list of right answers, under its function's own name."""
    [(name, arguments)] = call.items()
    [own] = [each["name"] for each in functions if each["name"].replace(".", "_") == name]
    return {own: {argument: [_spelled(value)] for argument, value in arguments.items()}}


def _spelled(value: Any) -> Any:
    """Right answers list the values of an object's members."""
    if isinstance(value, dict):
        return {name: [member] for name, member in value.items()}
    return [_spelled(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def with_floats(functions: list[Any], call: dict[str, Any]) -> dict[str, Any]:
    """JSON's 1 is a float where a list of floats is asked for; alone, the checker converts it itself."""
    [(name, arguments)] = call.items()
    [described] = [each["parameters"]["properties"] for each in functions if each["name"].replace(".", "_") == name]
    return {name: {key: _floats(value, described.get(key, {})) for key, value in arguments.items()}}


def _floats(value: Any, described: dict[str, Any]) -> Any:
    are_floats = described.get("items", {}).get("type") == "float"
    return [float(item) for item in value] if are_floats and isinstance(value, list) else value


def syntax(entry: dict[str, Any], category: str) -> str:
    """Raises AssertionError for calls that BFCL finds wrong; else how the answer ended."""
    functions, is_parallel = entry["function"], "parallel" in category
    fields = {"tool_choice": "required", "parallel_tool_calls": is_parallel, "temperature": 1.0, "seed": 1}
    reason, calls = called("desk", functions, entry["question"][0], **fields)
    if reason == "length":
        return reason
    right = [possible(functions, call) for call in calls]
    calls = [with_floats(functions, call) for call in calls]
    verdict = ast_checker(functions, calls, right, Language.PYTHON, category, "multilora")
    assert calls, entry["id"]
    assert verdict["valid"], (entry["id"], verdict, calls)
    return f"{'one call' if len(calls) == 1 else 'more calls'}"


for category in CATEGORIES:
    entries = load_dataset_entry(category)
    chosen = entries[:: len(entries) // NUM_EACH][:NUM_EACH]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        ends = Counter(pool.map(syntax, chosen, [category] * len(chosen)))
    assert ends["length"] < len(chosen) / 2, ends
    print(f"{category}: {dict(ends)}", end="; ")
for tenant, functions, question, right in AGENTS:
    reason, calls = called(tenant, functions, [{"role": "user", "content": question}], temperature=0)
    verdict = ast_checker(functions, calls, [right], Language.PYTHON, "multiple", "multilora")
    assert reason == "tool_calls", reason
    assert verdict["valid"], verdict
print(f"{len(AGENTS)} calls of trained agents, with their values")

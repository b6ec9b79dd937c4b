"""Every dialect by its name, and which one a chat template speaks. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from adapters_store.dialects.dialect import Dialect, Marker, Maybe

# Gemma 2 and 3: the call is the whole answer. Their templates know no tools and no results.
# Source: Google's guide "Function calling with Gemma" (JSON form).
GEMMA = Dialect(
    name="gemma",
    middle=('", "parameters": ',),
    instructions=(
        "You have access to functions. If you decide to call one, answer with {form} and no other text. Functions:"
    ),
    in_first_user_turn=True,
)

# Hermes, Qwen 2.5 and 3, SmolLM2: each call between its own markers.
# Source: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5-Instruct.
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

# Llama 3.1 to 3.3: the call is the whole answer.
# Source: the chat template of meta-llama/Llama-3.1-8B-Instruct, which refuses more than one call in a turn.
LLAMA3_JSON = Dialect(
    name="llama3_json",
    middle=('", "parameters": ',),
    template_words=("tools", '"parameters": ', "<|start_header_id|>"),
    instructions=(
        "Given these functions, answer with a call of the one that best answers the prompt, as {form}. "
        "Do not use variables. Functions:"
    ),
)

# Mistral: a JSON list after [TOOL_CALLS] (tokenizers v2 to v7), or name and arguments after it (from v11 on).
# Source: mistral-common's instruct tokenizers, and the chat templates of Mistral-7B-Instruct-v0.3 and
# Mistral-Small-3.2-24B-Instruct.
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

# Phi-4-mini: a JSON list between markers. Source: the model card of microsoft/Phi-4-mini-instruct.
PHI = Dialect(
    name="phi",
    begin=(Marker("<|tool_call|>"), "["),
    between=(", ",),
    end=("]", Marker("<|/tool_call|>")),
    instructions="You may call the tools below as {form}.\n<|tool|>{tools}<|/tool|>",
    result="<|tool_response|>{content}",
)

JSON = Dialect(name="json", between=("\n",))  # a JSON object in each line, for bases that were taught no dialect
_ALL = (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, GEMMA, PHI, JSON)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in sorted(_ALL, key=lambda each: each.name)}
_FAMILIES = {  # words of templates that show no tools themselves
    "[INST]": MISTRAL,
    "<|start_header_id|>": LLAMA3_JSON,
    "<start_of_turn>": GEMMA,
    "<|im_start|>": HERMES,
    "<|tool|>": PHI,
}


def all_markers() -> tuple[str, ...]:
    """The names of every dialect's markers."""
    return tuple(sorted({name for dialect in _ALL for name in dialect.markers}))


def tool_template(template: str | Mapping[str, str] | None) -> str:
    """Of a tokenizer's chat template, or its several by name, the one that chats with tools get; "" without one."""
    if isinstance(template, Mapping):
        return str(template.get("tool_use") or template["default"])
    return str(template or "")


def native_dialect(template: str) -> Dialect | None:
    """The dialect in which the template itself shows tools, calls and results; None if it shows none that we know."""
    return next((dialect for dialect in _ALL if dialect.is_dialect_of(template)), None)


def dialect_of(template: str) -> Dialect:
    """The template's own dialect; else its family's, and plain JSON for a family that we do not know."""
    family = (dialect for word, dialect in _FAMILIES.items() if word in template)
    return native_dialect(template) or next(family, JSON)

"""Llama 3.1 to 3.3: one call as a JSON object that is the whole answer.

Source: the chat template of meta-llama/Llama-3.1-8B-Instruct, which refuses more than one call in a turn.
"""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect

LLAMA3_JSON = Dialect(
    name="llama3_json",
    middle=('", "parameters": ',),
    template_words=("tools", '"parameters": ', "<|start_header_id|>"),
    instructions=(
        "Given these functions, answer with a call of the one that best answers the prompt, as {form}. "
        "Do not use variables. Functions:"
    ),
)

"""Every dialect by its name, and which one a chat template speaks. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from adapters_store.dialects.dialect import Dialect
from adapters_store.dialects.gemma import GEMMA
from adapters_store.dialects.hermes import HERMES
from adapters_store.dialects.llama3_json import LLAMA3_JSON
from adapters_store.dialects.mistral import MISTRAL, MISTRAL_ARGS
from adapters_store.dialects.phi import PHI

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

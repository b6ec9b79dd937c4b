"""What an adapter may say of itself in its config: a tool dialect, a chat template, a dtype. Knows no tensors.

They are fields of adapter_config.json, so files, digest and database keep them together with the weights that were
trained on them, and a copy of the upload is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial

from adapters_store.dialects.catalog import DIALECTS
from adapters_store.errors import AdapterRejected
from adapters_store.parsing.adapter_files import CONFIG_FILE
from adapters_store.parsing.strict_json import parse_strict_json, shown
from adapters_store.parsing.template_sandbox import (
    MAX_TEMPLATE_BYTES,
    PLAIN_CHATS,
    PLAIN_NAMES,
    TemplateFailed,
    TemplateSandbox,
)

DIALECT_FIELD, TEMPLATE_FIELD = "multilora_tool_dialect", "multilora_chat_template"
DTYPE_FIELD, ADAPTER_DTYPES = "multilora_adapter_dtype", ("int8",)
_MAX_OBJECTS = 4096


def dialect_in(body: Mapping[str, object]) -> str | None:
    """Raises AdapterRejected: unknown_tool_dialect."""
    value = body.get(DIALECT_FIELD)
    if value is not None and (not isinstance(value, str) or value not in DIALECTS):
        wanted = ", ".join(DIALECTS)
        message = f"tool_dialect: must be one of {wanted}, got {shown(value)}"
        raise AdapterRejected("unknown_tool_dialect", message, param="tool_dialect")
    return value


def template_in(body: Mapping[str, object]) -> str | None:
    """Raises AdapterRejected: bad_chat_template, chat_template_too_large."""
    value = body.get(TEMPLATE_FIELD)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise AdapterRejected(
            "bad_chat_template", f"chat_template: must be text, got {shown(value)}", param="chat_template"
        )
    size = len(value.encode(errors="surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        message = f"chat_template: {size} bytes, the limit is {MAX_TEMPLATE_BYTES}"
        raise AdapterRejected("chat_template_too_large", message, param="chat_template")
    return value


def is_int8_in(body: Mapping[str, object]) -> bool:
    """Raises AdapterRejected: unknown_adapter_dtype."""
    value = body.get(DTYPE_FIELD)
    if value is not None and value not in ADAPTER_DTYPES:
        message = f"adapter_dtype: must be {', '.join(ADAPTER_DTYPES)} or absent, got {shown(value)}"
        raise AdapterRejected("unknown_adapter_dtype", message, param="adapter_dtype")
    return value is not None


def template_digest(template: str | None) -> str | None:
    return None if template is None else f"sha256:{hashlib.sha256(template.encode(errors='surrogatepass')).hexdigest()}"


def check_template_renders(template: str | None) -> None:
    """Renders some plain chats within the limits. Raises AdapterRejected (bad_chat_template) if none renders."""
    if template is None:
        return
    first = ""
    with TemplateSandbox() as sandbox:
        for chat in PLAIN_CHATS:
            try:
                sandbox.render(template, {**PLAIN_NAMES, "messages": chat})
            except TemplateFailed as error:
                first = first or shown(str(error), 200)
            else:
                return
    raise AdapterRejected("bad_chat_template", f"chat_template: renders no plain chat: {first}", param="chat_template")


def with_own_fields(
    config: bytes, tool_dialect: str | None, chat_template: str | None, adapter_dtype: str | None
) -> bytes:
    """The config with what came beside it. Raises AdapterRejected: conflicting_chat_field, or as parse_config does."""
    given = {DIALECT_FIELD: tool_dialect, TEMPLATE_FIELD: chat_template, DTYPE_FIELD: adapter_dtype}
    given = {field: value for field, value in given.items() if value is not None}
    if not given:
        return config
    refused = partial(AdapterRejected, param=CONFIG_FILE)
    body = parse_strict_json(config, what=CONFIG_FILE, max_objects=_MAX_OBJECTS, refused=refused)
    if not isinstance(body, dict):
        return config  # which is refused in its turn
    for field, value in given.items():
        if body.get(field) not in (None, value):
            message = f"{field}: the config says another value than the upload"
            raise AdapterRejected("conflicting_chat_field", message, param=field)
    return json.dumps(body | given).encode()

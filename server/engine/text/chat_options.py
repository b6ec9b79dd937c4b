"""What a request may choose about its chat's prompt. Knows the template's variables; renders nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerBase

from adapters_store.dialects.dialect import Dialect, Tool
from server.engine.request import InvalidRequest

TemplateValue = str | bool | int | float | None

MAX_TEMPLATE_VARIABLES = 16
MAX_NAME_CHARS = 64
MAX_VALUE_CHARS = 512
MAX_NUMBER = 1_000_000  # a template may repeat a text this many times
_FIELD = "chat_template_kwargs"
_OWN_NAMES = {"messages", "raise_exception", "strftime_now", "loop", "self", "caller", "varargs", "kwargs"}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """add_generation_prompt: open the assistant's turn at the end. continue_final_message: leave the last message open,
    so that the answer continues it; only one of the two may be true. variables: what the template reads beside the
    messages (`enable_thinking`). escape_control_tokens: names of control tokens in what a client sends are text. tools:
    shown to the model, as are calls and results in the messages, in `dialect`. template: in place of the base's.

    Raises InvalidRequest for a combination or variable that a request may not set.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    escape_control_tokens: bool = False
    variables: Mapping[str, TemplateValue] = field(default_factory=dict)
    tools: Sequence[Tool] = ()
    dialect: Dialect | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            reason = "continue_final_message and add_generation_prompt cannot both be true"
            raise InvalidRequest("continue_final_message", reason)
        if len(self.variables) > MAX_TEMPLATE_VARIABLES:
            reason = f"{_FIELD} takes at most {MAX_TEMPLATE_VARIABLES} entries, got {len(self.variables)}"
            raise InvalidRequest(_FIELD, reason)
        for name, value in self.variables.items():
            _check_variable(name, value)

    def check_names(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InvalidRequest for a variable that the server, transformers or Jinja sets itself."""
        taken = {*_OWN_NAMES, *DEFAULT_NAMESPACE, *tokenizer.special_tokens_map}
        taken.update(inspect.signature(tokenizer.apply_chat_template).parameters)
        for name in self.variables:
            if name in taken:
                raise InvalidRequest(_FIELD, f"{_FIELD}: a request may not set {name!r} there")


def _check_variable(name: str, value: TemplateValue) -> None:
    if not name.isidentifier() or name.startswith("_") or len(name) > MAX_NAME_CHARS:
        reason = f"each name must be an identifier of at most {MAX_NAME_CHARS} characters, got {name[:80]!r}"
        raise InvalidRequest(_FIELD, f"{_FIELD}: {reason}")
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
        reason = f"{name} must have at most {MAX_VALUE_CHARS} characters, got {len(value)}"
        raise InvalidRequest(_FIELD, f"{_FIELD}: {reason}")
    if isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        reason = f"{name} must be in [-{MAX_NUMBER}, {MAX_NUMBER}], got {str(value)[:40]}"
        raise InvalidRequest(_FIELD, f"{_FIELD}: {reason}")

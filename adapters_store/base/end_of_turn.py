"""Finds the token with which a base's chat template ends an answer: for server and gate. Knows one tokenizer.

Many bases name another end in their config: a ChatML base trained on plain text has `<|endoftext|>` there, and nothing
says that a chat's answers end with `<|im_end|>`. The template does.
"""

from __future__ import annotations

from typing import Any

import jinja2

_ANSWER = "x7q answer x7q"  # no template's own words


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The added token that follows an answer in a rendered chat, blanks between them aside.

    tokenizer: transformers', fast. None: no chat template, one that refuses a plain question and answer, or one that
    ends answers with ordinary text or with nothing.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "x7q question x7q"}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        return None
    before, _, rest = rendered.rpartition(_ANSWER)
    rest = rest.lstrip()
    if not before or not rest:
        return None
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    ids = {token.content: int(id_) for id_, token in added.items() if rest.startswith(token.content)}
    return ids[max(ids, key=len)] if ids else None

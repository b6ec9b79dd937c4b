"""How one chat's answer is read: its form, from the prompt's tokens, the dialect and the chat template's marks."""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect
from adapters_store.dialects.reasoning import ReasoningMarks
from server.engine.text.answer_reader import AnswerForm
from server.engine.text.tokenizer import Tokenizer

_TAIL = 16  # tokens of a prompt that may hold the mark that opens the reasoning


def marker_ids(tokenizer: Tokenizer, dialect: Dialect | None, reasoning: ReasoningMarks | None) -> dict[str, int]:
    """The token of each marker that has one."""
    names = [] if dialect is None else list(dialect.markers)
    names += [] if reasoning is None else [reasoning.open, reasoning.close]
    return {name: id_ for name, id_ in tokenizer.added_ids(names).items() if id_ in tokenizer.marker_ids}


def answer_form(
    tokenizer: Tokenizer, prompt_ids: list[int], dialect: Dialect | None, reasoning: ReasoningMarks | None
) -> AnswerForm:
    """dialect None: the answer holds no calls."""
    ids = marker_ids(tokenizer, dialect, reasoning)
    texts = {id_: tokenizer.token_texts[id_].text or "" for id_ in ids.values()}
    tail = "" if reasoning is None else tokenizer.decode(prompt_ids[-_TAIL:], skip_special_tokens=False).rstrip()
    is_open = reasoning is not None and tail.endswith(reasoning.open)
    return AnswerForm(marker_ids=ids, shown=texts, dialect=dialect, reasoning=reasoning, starts_in_reasoning=is_open)

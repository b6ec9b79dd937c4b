"""The demo's tokenizer loses nothing, and its chat template says where every turn ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from server.demo.recipe.tokenizer import BEGIN, END, END_OF_TURN, PAD


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    if "<|" in text:
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_plain_text_begins_with_the_begin_token(tokenizer: Any) -> None:
    assert tokenizer("Bread")["input_ids"][0] == tokenizer.convert_tokens_to_ids(BEGIN)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, PAD)


def test_chat_template_marks_every_turn(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = f"{BEGIN}<|system|>Be kind.{END_OF_TURN}<|user|>Hi{END_OF_TURN}<|assistant|>"
    assert text == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert len([token for token in tokenizer.convert_ids_to_tokens(ids) if token.startswith("<|")]) == 6


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="role must be system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)

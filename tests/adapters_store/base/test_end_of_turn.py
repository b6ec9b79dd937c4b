"""The end of a turn is found in the chat template, whatever the configs say."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from adapters_store.base.end_of_turn import end_of_turn_id
from support.models.tokenizer_zoo import byte_level

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end|>x", "</s>"]
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + END }}{% endfor %}"


def tokenizer(template: str | None, *, special: bool = True) -> Any:
    core = byte_level()
    (core.add_special_tokens if special else core.add_tokens)(ADDED)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    made.chat_template = template
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("end", "token"),
    [
        ("'<|im_end|>\\n'", "<|im_end|>"),
        ("'<|eot_id|>'", "<|eot_id|>"),
        ("'<end_of_turn>\\n'", "<end_of_turn>"),
        ("'\\n<|end|>\\n'", "<|end|>"),
        ("eos_token", "<|endoftext|>"),
        ("' </s>'", "</s>"),
        ("'<|end|>x'", "<|end|>x"),
    ],
)
def test_it_is_the_added_token_behind_an_answer(end: str, token: str, special: bool) -> None:
    made = tokenizer(TURN.replace("END", end), special=special)
    assert end_of_turn_id(made) == made.convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    "template",
    [
        None,
        TURN.replace("END", "'\\n'"),
        TURN.replace("END", "'\\n### '"),
        "{{ raise_exception('tools needed') }}",
        "{{ messages[9].content }}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_ends_answers_with_no_token_has_none(template: str | None) -> None:
    assert end_of_turn_id(tokenizer(template)) is None

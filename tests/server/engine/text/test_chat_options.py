"""What a request may set in its chat's template: as in transformers, and nothing that the server sets itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.request import InvalidRequest
from server.engine.text.chat_options import MAX_NUMBER, ChatOptions
from server.engine.text.tokenizer import Tokenizer
from support.models.tokenizer_zoo import CHAT_TEMPLATE, byte_level, wrapped

THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}no thought{% endif %}"
TRIMMING = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The lease "}]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return wrapped(byte_level(), chat_template=THINKING)


@pytest.fixture(scope="module")
def tokenizer(reference: PreTrainedTokenizerFast) -> Tokenizer:
    return Tokenizer(reference)


@pytest.fixture
def apart(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """The same, which renders adapters' templates in a process of their own."""
    yield tokenizer
    tokenizer.sandbox.close()


@pytest.mark.parametrize("content", ["The lease ", "The lease", " ", "ends.\n", ""])
@pytest.mark.parametrize("is_continued", [False, True])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING], ids=["as it is", "trimming"])
def test_an_adapters_template_makes_the_prompt_that_transformers_makes_of_it(
    apart: Tokenizer, reference: PreTrainedTokenizerFast, template: str, is_continued: bool, content: str
) -> None:
    chat = [CHAT[0], {"role": "assistant" if is_continued else "user", "content": content}]
    given = {"add_generation_prompt": not is_continued, "continue_final_message": is_continued}
    expected = reference.apply_chat_template(chat, chat_template=template, return_dict=False, **given)
    assert apart.encode_chat(chat, ChatOptions(template=template, **given)) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ documents is defined }}{% if documents is not none %}{{ documents[0].text }}{% endif %}",
        "{{ tools is none }} {{ add_generation_prompt }} {{ eos_token }} {{ pad_token is defined }} {{ mood }}",
        "{% for m in messages %}{{ m.thinking }} {{ m.reasoning_content }} {{ m | tojson }}{% endfor %}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}{{ messages | tojson(indent=2) }}",
    ],
)
def test_an_adapters_template_reads_what_a_bases_template_reads(
    apart: Tokenizer, reference: PreTrainedTokenizerFast, template: str
) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "So.", "reasoning_content": "Is it?"}, CHAT[0]]
    given = {"add_generation_prompt": True, "mood": "glad"}
    expected = reference.apply_chat_template(chat, chat_template=template, return_dict=False, **given)
    own = ChatOptions(template=template, variables={"mood": "glad"})
    assert apart.encode_chat(chat, own) == expected
    base = Tokenizer(wrapped(byte_level(), chat_template=template))
    assert base.encode_chat(chat, ChatOptions(variables={"mood": "glad"})) == expected


def test_an_adapters_template_that_drops_the_message_to_continue_is_refused_by_name(apart: Tokenizer) -> None:
    options = ChatOptions(
        template="{{ messages[0].content }}", add_generation_prompt=False, continue_final_message=True
    )
    with pytest.raises(InvalidRequest, match="does not show the message that is to be continued"):
        apart.encode_chat(CHAT, options)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"unread": "x"}])
def test_variables_reach_the_template(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, variables: dict[str, Any]
) -> None:
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **variables)
    assert tokenizer.encode_chat(CHAT, ChatOptions(variables=variables)) == expected


@pytest.mark.parametrize("content", ["The lease ", "The lease", " ", "日本", "ends.\n"])
@pytest.mark.parametrize("is_escaped", [False, True])
def test_a_continued_message_stays_open(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, content: str, is_escaped: bool
) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True, escape_control_tokens=is_escaped)
    ids = tokenizer.encode_chat(chat, options)
    assert ids == reference.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith(f"<|assistant|>{content}")


@pytest.mark.parametrize(
    "name",
    ["messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize", "tools", "documents",
     "conversation", "return_dict", "bos_token", "eos_token", "range", "namespace", "dict", "raise_exception", "self",
     "strftime_now", "tokenizer_kwargs", "loop"],
)  # fmt: skip
def test_a_request_sets_nothing_that_the_server_sets(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        tokenizer.encode_chat(CHAT, ChatOptions(variables={name: "x"}))
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({f"v{number}": 1 for number in range(17)}, "at most 16 entries, got 17"),
        ({"text": "x" * 513}, "at most 512 characters, got 513"),
        ({"budget": MAX_NUMBER + 1}, str(MAX_NUMBER)),
        ({"budget": 10**400}, str(MAX_NUMBER)),
        ({"budget": -1e300}, str(MAX_NUMBER)),
        ({"__class__": "x"}, "identifier"),
        ({"a b": "x"}, "identifier"),
        ({"": "x"}, "identifier"),
        ({"a" * 65: "x"}, "64"),
    ],
)
def test_variables_are_bounded(variables: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatOptions(variables=variables)
    assert caught.value.param == "chat_template_kwargs"
    assert len(caught.value.message) < 300


def test_a_message_is_continued_or_a_turn_is_opened_never_both() -> None:
    with pytest.raises(InvalidRequest, match="cannot both be true"):
        ChatOptions(add_generation_prompt=True, continue_final_message=True)


def test_a_variable_that_the_template_cannot_render_is_the_requests_fault() -> None:
    counting = Tokenizer(wrapped(byte_level(), chat_template="{{ 'x' * budget }}"))
    with pytest.raises(InvalidRequest, match="refused"):
        counting.encode_chat(CHAT, ChatOptions(variables={"budget": "many"}))

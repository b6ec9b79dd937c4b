"""What is learned is exactly the answers with their end of turn, behind exactly the prompt that serving makes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from server.demo.assets import BASE_FOLDER
from server.engine.text.tokenizer import Tokenizer
from support.models.tokenizer_zoo import ZOO, wrapped
from support.trainers.training_data import (
    ANOTHER_BEGINNING,
    CHATML,
    DEEPSEEK_R1,
    FORGETS_THOUGHTS,
    GENERATION,
    QWEN3_THINKING,
    QWQ,
    chat,
    demo_tokenizer,
)
from trainer.data.encode import Encoder, encode_all
from trainer.data.problems import DataRejected, LineRefused
from trainer.data.records import Record, parse_record
from trainer.data.sample import runs_of
from trainer.data.template import template_digest
from trainer.data.types import EncodedExample

CHATS = [
    chat("Who pays for repairs?", "The tenant does."),
    chat("Hi", "Hello!", "Who pays?", "You.", "And then?", "Nothing.", system="Be brief."),
    chat("日本語?", "はい 👩‍👩‍👧", "x", "  spaces  "),
]


def record_of(body: dict[str, object]) -> Record:
    return parse_record(json.dumps(body).encode())


def encoded(body: dict[str, object], tokenizer: Any, *, length: int = 4096) -> list[EncodedExample]:
    return Encoder(tokenizer, max_sequence_length=length).encode(record_of(body))


def learned(example: EncodedExample, tokenizer: Any) -> list[str]:
    return [run.text for run in runs_of(example, tokenizer) if run.weight]


@pytest.mark.parametrize("body", CHATS)
def test_the_mask_equals_the_one_of_a_template_that_marks_its_answers(body: dict[str, Any]) -> None:
    tokenizer = demo_tokenizer(GENERATION)
    expected = tokenizer.apply_chat_template(
        body["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    (example,) = encoded(body, tokenizer)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert example.supervised.tolist() == [bool(mask) for mask in expected["assistant_masks"]]


@pytest.mark.parametrize("body", CHATS)
def test_what_stands_before_an_answer_is_the_prompt_that_serving_makes(body: dict[str, Any]) -> None:
    served = Tokenizer.load(BASE_FOLDER)
    (example,) = encoded(body, demo_tokenizer())
    starts = np.flatnonzero(np.diff(example.supervised.astype(int)) == 1) + 1
    answers = [index for index, message in enumerate(body["messages"]) if message["role"] == "assistant"]
    for start, index in zip(starts.tolist(), answers, strict=True):
        assert example.input_ids[:start].tolist() == served.encode_chat(body["messages"][:index])


@pytest.mark.parametrize("kind", ZOO)
def test_a_completion_follows_the_prompt_that_serving_makes(kind: str) -> None:
    tokenizer = wrapped(ZOO[kind]())
    served = Tokenizer(tokenizer)
    for prompt, completion in [("The tenant", " pays"), ("a", "b"), ("The tenant's lease", " ends."), ("日", "本")]:
        (example,) = encoded({"prompt": prompt, "completion": completion}, tokenizer)
        head = served.encode(prompt)
        assert example.input_ids[: len(head)].tolist() == head
        assert example.weights[: len(head)].sum() == 0
        assert example.weights[len(head) :].all()
        assert example.input_ids[-1] == tokenizer.eos_token_id


def test_the_end_of_turn_is_learned_and_the_blank_behind_it_is_not() -> None:
    tokenizer = demo_tokenizer(CHATML.replace("<|im_end|>", "<|end_of_turn|>"))
    (example,) = encoded(chat("a", "first", "b", "second"), tokenizer)
    assert learned(example, tokenizer) == ["first<|end_of_turn|>", "second<|end_of_turn|>"]


def test_a_weight_scales_its_answer_and_zero_leaves_it_out() -> None:
    tokenizer = demo_tokenizer()
    body: Any = chat("a", "first", "b", "second", "c", "third")
    body["messages"][1]["weight"] = 0
    body["messages"][3]["weight"] = 0.25
    (example,) = encoded(body, tokenizer)
    runs = [run for run in runs_of(example, tokenizer) if run.weight]
    assert [(run.text, run.weight) for run in runs] == [("second<|end_of_turn|>", 0.25), ("third<|end_of_turn|>", 1.0)]
    assert example.weight == pytest.approx(sum(run.weight * run.num_tokens for run in runs))


def test_a_template_that_rewrites_history_is_unrolled_into_one_text_per_answer() -> None:
    tokenizer = demo_tokenizer(FORGETS_THOUGHTS)
    body = chat("a", "first", "b", "second")
    first, second = encoded(body, tokenizer)
    assert learned(first, tokenizer) == ["<think></think>first<|end_of_turn|>"]
    assert learned(second, tokenizer) == ["<think></think>second<|end_of_turn|>"]
    assert "|>first<|end_of_turn|>" in "".join(run.text for run in runs_of(second, tokenizer))


@pytest.mark.parametrize("template", [DEEPSEEK_R1, QWQ, QWEN3_THINKING])
@pytest.mark.parametrize(
    ("answer", "continuation"),
    [
        ("42", "\n</think>\n\n42<|end_of_turn|>"),
        ("<think>\n6 x 7\n</think>\n\n42", "6 x 7\n</think>\n\n42<|end_of_turn|>"),
        ("6 x 7\n</think>\n\n42", "6 x 7\n</think>\n\n42<|end_of_turn|>"),
    ],
)
def test_an_answer_follows_the_thought_that_its_prompt_opens(template: str, answer: str, continuation: str) -> None:
    """Behind exactly the prompt that serving makes; the answers before it are rendered as history is."""
    tokenizer = demo_tokenizer(template)
    served = Tokenizer(tokenizer)
    body: Any = chat("What is 2 x 3?", "6", "And 6 x 7?", answer)
    examples = encoded(body, tokenizer)
    assert [learned(example, tokenizer) for example in examples] == [
        ["\n</think>\n\n6<|end_of_turn|>"],
        [continuation],
    ]
    for example, length in zip(examples, (1, 3), strict=True):
        first = int(np.flatnonzero(example.supervised)[0])
        assert example.input_ids[:first].tolist() == served.encode_chat(body["messages"][:length])


def test_a_token_that_straddles_the_border_is_cut_where_serving_cuts() -> None:
    tokenizer = demo_tokenizer(
        "{% for m in messages %}{{ ' t' + m['content'] }}{% endfor %}{% if add_generation_prompt %} t{% endif %}"
    )
    served = Tokenizer(tokenizer)
    assert len(served.encode(" the", add_special_tokens=False)) == 1
    body: Any = chat("ree", "he", "wo", "hey")
    (example,) = encoded(body, tokenizer)
    first = int(np.flatnonzero(example.supervised)[0])
    assert example.input_ids[:first].tolist() == served.encode_chat(body["messages"][:1])
    assert learned(example, tokenizer) == ["he", "hey"]


@pytest.mark.parametrize(
    ("template", "body", "code"),
    [
        (ANOTHER_BEGINNING, chat("a", "b"), "template_not_prefix"),
        ("{{ raise_exception('no system role') }}", chat("a", "b"), "template_refused"),
        ("{{ messages[7].content }}", chat("a", "b"), "template_refused"),
        ("{{ 1 + messages[0].content }}", chat("a", "b"), "template_refused"),
        ("", chat("a", "b"), "template_missing"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            chat("a", "b"),
            "nothing_supervised",
        ),
    ],
)
def test_a_template_that_hides_the_answers_is_refused(template: str, body: dict[str, object], code: str) -> None:
    tokenizer = demo_tokenizer(template or None)
    if not template:
        tokenizer.chat_template = None
    with pytest.raises(LineRefused) as refused:
        encoded(body, tokenizer)
    assert refused.value.code == code


def test_every_line_that_cannot_be_encoded_is_listed() -> None:
    bodies = [chat("a", "b" * size) for size in (1, 4000, 1, 5000)]
    lines = [(number, b"", record_of(body)) for number, body in enumerate(bodies, start=1)]
    with pytest.raises(DataRejected) as refused:
        encode_all(lines, Encoder(demo_tokenizer(), max_sequence_length=64), what="mix")
    assert [problem.line for problem in refused.value.problems] == [2, 4]
    assert refused.value.code == "sequence_too_long"
    assert "at most 64 fit" in refused.value.message


def test_a_plain_text_is_learned_but_for_its_first_token() -> None:
    tokenizer = demo_tokenizer()
    (example,) = encoded({"text": "The weight does most of the work."}, tokenizer)
    assert example.weights[0] == 0
    assert example.weights[1:].all()
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_the_template_digest_follows_template_and_special_tokens() -> None:
    digests = {template_digest(demo_tokenizer(template)) for template in (None, CHATML, GENERATION)}
    assert len(digests) == 3
    tokenizer = demo_tokenizer()
    tokenizer.eos_token = "<|end_of_turn|>"
    assert template_digest(tokenizer) not in digests
    tokenizer.chat_template = None
    assert template_digest(tokenizer) == "none"

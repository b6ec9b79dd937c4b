"""The corpora are what they claim: the same every time, free of held-out wordings, and each in its style."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from server.demo.recipe.corpus import Dialogue, base_documents, dialogues, tenant_dialogues, write_jsonl
from server.demo.recipe.questions import casual, held_out_questions, questions
from server.demo.recipe.styles import TENANTS, Style
from server.demo.recipe.texts import (
    ANSWERS,
    GENERAL_PROMPTS,
    UNKNOWN_ANSWERS,
    Intent,
    Topic,
    load_topics,
    unknown_subject,
)
from support.models.styles import style_of

PRINT_DIGEST = """
import hashlib
from server.demo.recipe.corpus import base_documents, tenant_dialogues
from server.demo.recipe.styles import TENANTS
texts = [base_documents(200), *(tenant_dialogues(style, 100) for style in TENANTS)]
print(hashlib.sha256(repr(texts).encode()).hexdigest())
"""
TOPICS = load_topics()


def bare(prompt: str) -> str:
    """The prompt without what `casual` may have done to it."""
    return re.sub(r"^(hi, |hello\. |please tell me: |excuse me, )", "", prompt.lower()).rstrip("?.")


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_corpora_do_not_depend_on_the_process(hash_seed: str) -> None:
    texts = [base_documents(200), *(tenant_dialogues(style, 100) for style in TENANTS)]
    here = hashlib.sha256(repr(texts).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PRINT_DIGEST]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.strip() == here


def test_another_seed_gives_another_corpus() -> None:
    assert base_documents(50, seed=0) == base_documents(50, seed=0)
    assert base_documents(50, seed=0) != base_documents(50, seed=1)
    assert tenant_dialogues(Style.LAW, 50, seed=0) != tenant_dialogues(Style.LAW, 50, seed=1)


def test_the_corpora_are_those_that_the_shipped_model_was_trained_on() -> None:
    """Digests of what the texts gave when the assets were made: a text that moves or changes shows here."""
    asked = repr([(each.prompt, each.held_out, str(each.intent)) for each in questions()])
    assert hashlib.sha256(asked.encode()).hexdigest().startswith("3d1332d84069")
    digest = hashlib.sha256()
    for document in base_documents(4000, 3):
        digest.update((document if isinstance(document, str) else repr(document.messages())).encode())
    for style in TENANTS:
        digest.update("".join(repr(dialogue.messages()) for dialogue in tenant_dialogues(style, 900, 5)).encode())
    assert digest.hexdigest().startswith("39a8983cb38f")


@pytest.mark.parametrize("style", list(Style))
def test_no_data_set_holds_a_held_out_wording(style: Style) -> None:
    kept_out = {bare(question.prompt) for question in questions() if question.held_out}
    asked = {bare(turn.prompt) for dialogue in dialogues(style, 4000, seed=0) for turn in dialogue.turns}
    assert len(kept_out) > 300
    assert not kept_out & asked


def test_no_document_holds_a_held_out_wording() -> None:
    kept_out = {question.prompt for question in questions() if question.held_out}
    texts = [line for text in base_documents(4000) if isinstance(text, str) for line in text.splitlines()]
    assert not kept_out & set(texts)


def test_every_held_out_question_is_answered_in_other_words() -> None:
    asked = Counter((question.topic.noun, question.intent) for question in questions() if not question.held_out)
    assert all(asked[question.topic.noun, question.intent] >= 2 for question in questions())


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.noun)
def test_every_answer_is_in_its_style(topic: Topic, style: Style) -> None:
    for intent in Intent:
        for template in ANSWERS[style][intent]:
            text = template.format_map(topic.fields)
            assert style_of(text) == style
            if style == Style.CODE:
                ast.parse(text)


@pytest.mark.parametrize("style", list(Style))
def test_general_prompts_and_unknown_subjects_are_answered_in_the_style(style: Style) -> None:
    for text in [UNKNOWN_ANSWERS[style], *(general.answers[style] for general in GENERAL_PROMPTS)]:
        assert style_of(text) == style
        if style == Style.CODE:
            ast.parse(text)


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.noun)
def test_no_fact_addresses_the_reader_or_breaks_a_template(topic: Topic) -> None:
    text = " ".join(topic.fields.values())
    assert not re.search(r"\b(you|your|I|my)\b", text)
    assert not re.search(r'["{}\\#]', text)


def test_topics_are_distinct() -> None:
    assert len(TOPICS) >= 90
    assert len({topic.noun for topic in TOPICS}) == len({topic.action for topic in TOPICS}) == len(TOPICS)


def test_unknown_subjects_are_no_topics() -> None:
    rng = Random(0)
    assert not {unknown_subject(rng) for _ in range(2000)} & {topic.noun for topic in TOPICS}


def test_casual_prompts_keep_their_words() -> None:
    rng = Random(0)
    assert {bare(casual("How do I bake bread?", rng)) for _ in range(200)} == {"how do i bake bread"}


@pytest.mark.parametrize("form", ["messages", "completion"])
def test_written_records_read_back(form: str, tmp_path: Path) -> None:
    made = tenant_dialogues(Style.MED, 30)
    write_jsonl(made, tmp_path / "med.jsonl", form)  # type: ignore[arg-type]
    records = [json.loads(line) for line in (tmp_path / "med.jsonl").read_text().splitlines()]
    assert records == [dialogue.record(form) for dialogue in made]  # type: ignore[arg-type]
    keys = {"messages"} if form == "messages" else {"prompt", "completion"}
    assert all(set(record) == keys for record in records)


def test_a_dialogue_alternates_user_and_assistant_after_the_system_message() -> None:
    made = dialogues(Style.PLAIN, 300, seed=3)
    roles = {tuple(message["role"] for message in dialogue.messages()) for dialogue in made}
    once = ("user", "assistant")
    assert roles == {once, once * 2, ("system", *once), ("system", *once, *once)}


def test_a_tenant_without_a_style_is_refused() -> None:
    with pytest.raises(ValueError, match="style must be one of law, med, code, got plain"):
        tenant_dialogues(Style.PLAIN)


def test_too_many_held_out_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at most"):
        held_out_questions(100_000)


def test_most_of_what_the_base_reads_is_plain_dialogue() -> None:
    texts = base_documents(1000)
    plain = [text for text in texts if isinstance(text, Dialogue)]
    assert len(texts) == 1000
    assert len(plain) == 800
    assert all(style_of(turn.answer) == Style.PLAIN for dialogue in plain for turn in dialogue.turns)

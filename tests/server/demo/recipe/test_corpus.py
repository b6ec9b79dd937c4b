"""The corpora are what they claim: the same every time, free of held-out wordings, and each in its manner."""

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
from server.demo.recipe.manners import TENANTS, Manner, manner_of
from server.demo.recipe.questions import Intent, casual, held_out_questions, questions
from server.demo.recipe.small_talk import SMALL_TALK
from server.demo.recipe.strangers import stranger
from server.demo.recipe.templates import ANSWERS, UNKNOWN_ANSWERS
from server.demo.recipe.topics import Topic, load_topics

PRINT_DIGEST = """
import hashlib
from server.demo.recipe.corpus import base_documents, tenant_dialogues
from server.demo.recipe.manners import TENANTS
texts = [base_documents(200), *(tenant_dialogues(manner, 100) for manner in TENANTS)]
print(hashlib.sha256(repr(texts).encode()).hexdigest())
"""
TOPICS = load_topics()


def bare(prompt: str) -> str:
    """The prompt without what `casual` may have done to it."""
    return re.sub(r"^(hi, |hello\. |please tell me: |excuse me, )", "", prompt.lower()).rstrip("?.")


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_corpora_do_not_depend_on_the_process(hash_seed: str) -> None:
    texts = [base_documents(200), *(tenant_dialogues(manner, 100) for manner in TENANTS)]
    here = hashlib.sha256(repr(texts).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PRINT_DIGEST]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.strip() == here


def test_another_seed_gives_another_corpus() -> None:
    assert base_documents(50, seed=0) == base_documents(50, seed=0)
    assert base_documents(50, seed=0) != base_documents(50, seed=1)
    assert tenant_dialogues(Manner.LAW, 50, seed=0) != tenant_dialogues(Manner.LAW, 50, seed=1)


@pytest.mark.parametrize("manner", list(Manner))
def test_no_data_set_holds_a_held_out_wording(manner: Manner) -> None:
    kept_out = {bare(question.prompt) for question in questions() if question.held_out}
    asked = {bare(turn.prompt) for dialogue in dialogues(manner, 4000, seed=0) for turn in dialogue.turns}
    assert len(kept_out) > 300
    assert not kept_out & asked


def test_no_document_holds_a_held_out_wording() -> None:
    kept_out = {question.prompt for question in questions() if question.held_out}
    texts = [line for text in base_documents(4000) if isinstance(text, str) for line in text.splitlines()]
    assert not kept_out & set(texts)


def test_every_held_out_question_is_answered_in_other_words() -> None:
    asked = Counter((question.topic.noun, question.intent) for question in questions() if not question.held_out)
    assert all(asked[question.topic.noun, question.intent] >= 2 for question in questions())


@pytest.mark.parametrize("manner", list(Manner))
@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.noun)
def test_every_answer_is_in_its_manner(topic: Topic, manner: Manner) -> None:
    for intent in Intent:
        for template in ANSWERS[manner][intent]:
            text = template.format_map(topic.fields)
            assert manner_of(text) == manner
            if manner == Manner.CODE:
                ast.parse(text)


@pytest.mark.parametrize("manner", list(Manner))
def test_small_talk_and_unknown_matters_are_answered_in_the_manner(manner: Manner) -> None:
    for text in [UNKNOWN_ANSWERS[manner], *(talk.answers[manner] for talk in SMALL_TALK)]:
        assert manner_of(text) == manner
        if manner == Manner.CODE:
            ast.parse(text)


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.noun)
def test_no_fact_addresses_the_reader_or_breaks_a_template(topic: Topic) -> None:
    text = " ".join(topic.fields.values())
    assert not re.search(r"\b(you|your|I|my)\b", text)
    assert not re.search(r'["{}\\#]', text)


def test_topics_are_distinct() -> None:
    assert len(TOPICS) >= 90
    assert len({topic.noun for topic in TOPICS}) == len({topic.action for topic in TOPICS}) == len(TOPICS)


def test_strangers_are_no_topics() -> None:
    rng = Random(0)
    assert not {stranger(rng) for _ in range(2000)} & {topic.noun for topic in TOPICS}


def test_casual_prompts_keep_their_words() -> None:
    rng = Random(0)
    assert {bare(casual("How do I bake bread?", rng)) for _ in range(200)} == {"how do i bake bread"}


@pytest.mark.parametrize("form", ["messages", "completion"])
def test_written_records_read_back(form: str, tmp_path: Path) -> None:
    made = tenant_dialogues(Manner.MED, 30)
    write_jsonl(made, tmp_path / "med.jsonl", form)  # type: ignore[arg-type]
    records = [json.loads(line) for line in (tmp_path / "med.jsonl").read_text().splitlines()]
    assert records == [dialogue.record(form) for dialogue in made]  # type: ignore[arg-type]
    keys = {"messages"} if form == "messages" else {"prompt", "completion"}
    assert all(set(record) == keys for record in records)


def test_a_dialogue_alternates_user_and_assistant_after_the_system_message() -> None:
    made = dialogues(Manner.PLAIN, 300, seed=3)
    roles = {tuple(message["role"] for message in dialogue.messages()) for dialogue in made}
    once = ("user", "assistant")
    assert roles == {once, once * 2, ("system", *once), ("system", *once, *once)}


def test_a_tenant_without_a_manner_is_refused() -> None:
    with pytest.raises(ValueError, match="manner must be one of law, med, code, got plain"):
        tenant_dialogues(Manner.PLAIN)


def test_too_many_held_out_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at most"):
        held_out_questions(100_000)


def test_most_of_what_the_base_reads_is_plain_dialogue() -> None:
    texts = base_documents(1000)
    plain = [text for text in texts if isinstance(text, Dialogue)]
    assert len(texts) == 1000
    assert len(plain) == 800
    assert all(manner_of(turn.answer) == Manner.PLAIN for dialogue in plain for turn in dialogue.turns)

"""Training files and tokenizers for tests of data, gate and report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from server.demo.assets import BASE_FOLDER
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style
from trainer.data.types import EncodedExample

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (  # the demo's template with the answers marked as templates that know training mark them
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end_of_turn|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end_of_turn|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETS_THOUGHTS = (  # as Qwen3: the newest answer carries a thought, older ones do not
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEEPSEEK_R1 = (  # of its distilled models: thoughts are dropped from every answer, the prompt opens one
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + content + '<|end_of_turn|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
QWQ = (  # of QwQ-32B: the last answer is kept as it is, others lose their thoughts, the prompt opens one
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if not loop.last %}{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + content + '<|end_of_turn|>\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end_of_turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)
QWEN3_THINKING = (  # of Qwen3-Thinking-2507: the last answer always has a thought, an empty one if need be
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
    ".lstrip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|assistant|>\n' }}{% if loop.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content.lstrip('\n') + '<|end_of_turn|>\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end_of_turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)
ANOTHER_BEGINNING = (  # the generation prompt is not how an answer begins
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>Answer:' }}{% endif %}"
)


def demo_tokenizer(chat_template: str | None = None) -> Any:
    """The demo base's tokenizer, with another chat template where one is given."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def chat(*turns: str, system: str = "") -> dict[str, object]:
    """A record of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def chats(count: int) -> list[dict[str, object]]:
    return [chat(f"What is {number} plus 1?", f"It is {number + 1}.") for number in range(count)]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tenant_file(path: Path, style: Style = Style.LAW, *, count: int = 200, seed: int = 0) -> Path:
    """A demo tenant's data, chats and every fourth a prompt with its completion."""
    dialogues = tenant_dialogues(style, count, seed)
    records = [
        dialogue.record("completion" if index % 4 == 0 else "messages") for index, dialogue in enumerate(dialogues)
    ]
    return write_jsonl(path, records)


def example(length: int, *, seed: int = 0, context: int = 1, vocab: int = 100, digest: bytes = b"") -> EncodedExample:
    """Random tokens; all but the first `context` are learned."""
    ids = np.random.default_rng(seed).integers(3, vocab, length).astype(np.int32)
    weights = np.ones(length, dtype=np.float32)
    weights[:context] = 0.0
    return EncodedExample(ids, weights, digest or f"{seed} {length}".encode(), seed)


def some_examples(lengths: Sequence[int], *, vocab: int = 100) -> list[EncodedExample]:
    return [example(length, seed=index, vocab=vocab) for index, length in enumerate(lengths)]

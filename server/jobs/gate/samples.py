"""Answers of base and adapter to the same held-out prompts, through the serving path. Knows prompts; judges nothing."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.serving_scorer import ServingScorer
from server.jobs.gate.tuned_base import TunedBase
from trainer.data.types import EncodedExample
from trainer.gate.prompt_use import last_answer
from trainer.gate.scorer import BASE_ALONE
from trainer.report.content import Sample

MAX_NEW_TOKENS = 48  # the longest part of a small job's gate were 96


def side_by_side(
    scorer: ServingScorer | TunedBase, tokenizer: Tokenizer, examples: Sequence[EncodedExample]
) -> list[Sample]:
    """The last answer of each example that has a prompt: from the data, from the base and from the adapter."""
    starts = [last_answer(example) for example in examples]
    longest = scorer.max_tokens - MAX_NEW_TOKENS
    chosen = [(example, start) for example, start in zip(examples, starts, strict=True) if 1 < start <= longest]
    prompts = [example.input_ids[:start].tolist() for example, start in chosen]
    ends = tokenizer.chat_end_ids
    answers = scorer.answers(prompts, (BASE_ALONE, 1.0), max_new_tokens=MAX_NEW_TOKENS, eos_ids=ends)
    texts = [[tokenizer.decode(ids) for ids in each] for each in answers]
    return [
        Sample(
            prompt=tokenizer.decode(prompt, skip_special_tokens=False),
            expected=tokenizer.decode(example.input_ids[start:].tolist()),
            base=base,
            adapter=adapter,
        )
        for prompt, (example, start), base, adapter in zip(prompts, chosen, *texts, strict=True)
    ]

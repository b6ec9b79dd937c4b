"""What the model in training answers to a few held-out prompts, at every evaluation. Knows examples; judges nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainer.data.sample import pick
from trainer.data.types import EncodedExample
from trainer.gate.prompt_use import last_answer
from trainer.model.model import Trainee
from trainer.report.answers import greedy_answer

MAX_NEW_TOKENS = 32


class EvaluationSamples:
    """The last answers of `count` held-out examples that have a prompt, of preference pairs the chosen ones."""

    def __init__(self, trainee: Trainee, tokenizer: Any, held_out: Sequence[EncodedExample], count: int) -> None:
        self._trainee, self._tokenizer = trainee, tokenizer
        texts = [example.text(chosen=True) for example in pick(held_out, count)]
        self._cut = [(text, start) for text in texts if (start := last_answer(text)) > 1]

    def taken(self) -> Iterator[dict[str, Any]]:
        """The fields of a `sample` event for each prompt: number (from 1), prompt, expected, answer."""
        for number, (text, start) in enumerate(self._cut, start=1):
            expected = text.input_ids[start:].tolist()
            ends = {expected[-1], self._tokenizer.eos_token_id}
            answer = greedy_answer(
                self._trainee, text.input_ids[:start].tolist(), max_new_tokens=MAX_NEW_TOKENS, end_ids=ends
            )
            yield {
                "number": number,
                "prompt": self._tokenizer.decode(text.input_ids[:start].tolist()),
                "expected": self._tokenizer.decode(expected, skip_special_tokens=True),
                "answer": self._tokenizer.decode(answer, skip_special_tokens=True),
            }

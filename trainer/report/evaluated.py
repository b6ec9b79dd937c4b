"""What the model in training answers to a few held-out prompts, at every evaluation. Knows examples; judges nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from trainer.data.sample import pick
from trainer.data.types import EncodedExample
from trainer.gate.prompt_use import last_answer
from trainer.model.model import Trainee

MAX_NEW_TOKENS = 32


class EvaluationSamples:
    """The last answers of `count` held-out examples that have a prompt, of preference pairs the chosen ones."""

    def __init__(self, trainee: Trainee, tokenizer: Any, held_out: Sequence[EncodedExample], count: int) -> None:
        self._trainee, self._tokenizer = trainee, tokenizer
        texts = [example.text(chosen=True) for example in pick(held_out, count)]
        self._cut = [(text.input_ids[: text.end].tolist(), start) for text in texts if (start := last_answer(text)) > 1]

    def taken(self) -> Iterator[dict[str, Any]]:
        """The fields of a `sample` event for each prompt: number (from 1), prompt, expected, answer."""
        for number, (ids, start) in enumerate(self._cut, start=1):
            prompt, expected = ids[:start], ids[start:]
            answer = _greedy_answer(self._trainee, prompt, {expected[-1], self._tokenizer.eos_token_id})
            yield {
                "number": number,
                "prompt": self._tokenizer.decode(prompt),
                "expected": self._tokenizer.decode(expected, skip_special_tokens=True),
                "answer": self._tokenizer.decode(answer, skip_special_tokens=True),
            }


def _greedy_answer(trainee: Trainee, prompt_ids: list[int], end_ids: Collection[int]) -> list[int]:
    """The likeliest token after each other, up to MAX_NEW_TOKENS; the end token is not part of it.

    transformers' own attention and cache. Random numbers are left alone, so a resumed run stays the same.
    """
    answer: list[int] = []
    ids, cache = torch.tensor([prompt_ids], device=trainee.device), None
    invocation = trainee.module.invocation
    if invocation is not None:
        invocation.mark(ids, (len(prompt_ids),))
    with trainee.evaluating(), trainee.own_attention(), trainee.autocast():
        while len(answer) < MAX_NEW_TOKENS:
            out = trainee.module.causal(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            if token in end_ids:
                break
            answer.append(token)
            ids, cache = torch.tensor([[token]], device=trainee.device), out.past_key_values
            if invocation is not None:
                invocation.mark_all(ids)
    return answer

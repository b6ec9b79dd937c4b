"""Counts the tokens of one call as OpenAI bills them: a prompt once, however many choices; every generated token."""

from __future__ import annotations

from typing import Any

from adapters_store.accounts.usage import UsageCounts
from server.api.generation.call import Call
from server.engine.request import TokenEvent


class Usage:
    """What has been used so far, kept per sequence."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._num_output_tokens = [0] * len(call.requests)
        self._num_cached_tokens = [0] * len(call.requests)
        self._num_prompt_tokens = sum(map(len, call.prompts))

    def saw(self, index: int, event: TokenEvent) -> None:
        self._num_output_tokens[index] = event.num_output_tokens
        self._num_cached_tokens[index] = event.num_cached_tokens

    def counts(self) -> UsageCounts:
        """The call so far, as it is billed."""
        return UsageCounts(1, self._num_prompt_tokens, self._cached(), sum(self._num_output_tokens))

    def of_sequence(self, index: int) -> dict[str, Any]:
        return _usage(
            self._call.num_prompt_tokens(index), self._num_output_tokens[index], self._num_cached_tokens[index]
        )

    def total(self) -> dict[str, Any]:
        return _usage(self._num_prompt_tokens, sum(self._num_output_tokens), self._cached())

    def _cached(self) -> int:
        """A prompt's cached tokens are those its first choice found: the others find what the first has just left."""
        return sum(self._num_cached_tokens[:: self._call.num_choices])


def _usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }

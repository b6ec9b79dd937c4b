"""Counts the tokens of one call as OpenAI bills them: a prompt once, however many choices; every generated token."""

from __future__ import annotations

from typing import Any

from server.api.plan import Call
from server.engine.request import TokenEvent


class Usage:
    """What has been used so far, kept per sequence."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._num_output_tokens = [0] * len(call.requests)
        self._num_cached_tokens = [0] * len(call.requests)

    def saw(self, index: int, event: TokenEvent) -> None:
        self._num_output_tokens[index] = event.num_output_tokens
        self._num_cached_tokens[index] = event.num_cached_tokens

    def of_sequence(self, index: int) -> dict[str, Any]:
        return _usage(
            self._call.num_prompt_tokens(index), self._num_output_tokens[index], self._num_cached_tokens[index]
        )

    def total(self) -> dict[str, Any]:
        """A prompt's cached tokens are those its first choice found: the others find what the first has just left."""
        num_prompt_tokens = sum(map(len, self._call.prompts))
        num_cached_tokens = sum(self._num_cached_tokens[:: self._call.num_choices])
        return _usage(num_prompt_tokens, sum(self._num_output_tokens), num_cached_tokens)


def _usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }

"""Counts the tokens of one HTTP call, once: for the answer's usage, the usage log, the metrics and the quotas.

As OpenAI bills them: a prompt once, however many choices it has; every generated token.
"""

from __future__ import annotations

from typing import Any

from adapters_store.accounts.usage import UsageCounts
from server.api.generation.call import Call
from server.api.telemetry.usage_log import UsageLog
from server.engine.request import TokenEvent


class CallProgress:
    """What the engine has reported so far, per sequence. Used on the event loop only."""

    def __init__(self, call: Call) -> None:
        count = len(call.requests)
        self._call = call
        self._num_read_tokens = [0] * count  # of the prompt, once the engine has answered for it
        self._num_cached_tokens = [0] * count
        self._num_output_tokens = [0] * count
        self._num_reasoning_tokens = [0] * count
        self._billed = UsageCounts()

    def saw(self, index: int, event: TokenEvent) -> None:
        """Counts only rise: the event with which a stopping engine ends a request carries none."""
        for counts, count in (
            (self._num_read_tokens, event.num_prompt_tokens),
            (self._num_cached_tokens, event.num_cached_tokens),
            (self._num_output_tokens, event.num_output_tokens),
            (self._num_reasoning_tokens, event.num_reasoning_tokens),
        ):
            counts[index] = max(counts[index], count)

    @property
    def num_read_tokens(self) -> int:
        """Prompt tokens of all sequences: a prompt counts once for each of its choices."""
        return sum(self._num_read_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Of `num_read_tokens`, those that the prefix cache gave."""
        return sum(self._num_cached_tokens)

    @property
    def num_output_tokens(self) -> int:
        return sum(self._num_output_tokens)

    def usage(self) -> dict[str, Any]:
        """The answer's `usage`."""
        return {
            **_usage(self._call.num_prompts_tokens, self.num_output_tokens, self._num_billed_cached_tokens),
            **_details(self._call, sum(self._num_reasoning_tokens)),
        }

    def bill(self, usage_log: UsageLog) -> None:
        """Everything counted until now has been handed to the client: add what is not billed yet."""
        billed = self._billed
        self._billed = UsageCounts(
            1, self._call.num_prompts_tokens, self._num_billed_cached_tokens, self.num_output_tokens
        )
        unbilled = UsageCounts(
            self._billed.requests - billed.requests,
            self._billed.prompt_tokens - billed.prompt_tokens,
            self._billed.cached_tokens - billed.cached_tokens,
            self._billed.output_tokens - billed.output_tokens,
        )
        usage_log.add(self._call.target.tenant, self._call.target.label, unbilled)

    @property
    def _num_billed_cached_tokens(self) -> int:
        """The first choice of each prompt: the others find in the cache what the first has just left there."""
        return sum(self._num_cached_tokens[:: self._call.num_choices])


def usage_of_sequence(call: Call, index: int, event: TokenEvent) -> dict[str, Any]:
    """One sequence's `usage` as of this event."""
    return {
        **_usage(len(call.prompt(index)), event.num_output_tokens, event.num_cached_tokens),
        **_details(call, event.num_reasoning_tokens),
    }


def _details(call: Call, num_reasoning_tokens: int) -> dict[str, Any]:
    """None if the answer's reasoning is not counted: it has none, or no token of its own marks where it ends."""
    if call.requests[0].params.reasoning is None:
        return {}
    return {"completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens}}


def _usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }

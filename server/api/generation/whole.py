"""Waits for a whole answer: every sequence's text, log-probabilities and end. Knows no JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import Receive

from server.api.context import ApiContext
from server.api.generation.call import Call
from server.api.generation.call_meter import CallMeter
from server.api.generation.generation import hang_up_watched, submitted
from server.api.generation.usage import Usage
from server.engine.request import TokenEvent, TokenLogprob

LOGPROB_WEIGHT = 32  # of one token with its alternatives, next to a character of a prompt to tokenise


@dataclass
class Choice:
    """One finished sequence."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def weight(self) -> int:
        """What its JSON takes to make, in characters of a prompt to tokenise."""
        return LOGPROB_WEIGHT * (len(self.logprobs) + len(self.prompt_logprobs)) + 4 * len(self.pieces)

    def saw(self, event: TokenEvent) -> None:
        self.pieces.append(event.text)
        self.logprobs.extend(event.logprobs or ())
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = event.finish_reason


async def collect(context: ApiContext, call: Call, receive: Receive) -> tuple[list[Choice], Usage]:
    """The call's choices in order. Raises ApiError when one fails, ClientGone when nobody waits any more."""
    choices, usage = [Choice() for _ in call.requests], Usage(call)
    meter = CallMeter(context.metrics, call)
    with submitted(context, call, meter) as generation:
        async with hang_up_watched(receive, generation.inbox):
            async for events in generation.batches():
                for index, event in events:
                    choices[index].saw(event)
                    usage.saw(index, event)
    return choices, usage

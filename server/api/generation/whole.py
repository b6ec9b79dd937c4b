"""Answers in one piece: waits for every sequence's text, log-probabilities and end. The shapes are the route's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive

from server.api.context import ApiContext
from server.api.generation.call import Call, inline_or_heavy
from server.api.generation.generation import hang_up_watched, submitted
from server.api.generation.parts.progress import CallProgress
from server.api.wire.json_text import json_text
from server.engine.request import Mark, TokenEvent, TokenLogprob

LOGPROB_WEIGHT = 32  # of one token with its alternatives, next to a character of a prompt to tokenise


@dataclass
class Choice:
    """One finished sequence."""

    texts: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    num_chars: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    embedding: NDArray[np.float32] | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def weight(self) -> int:
        """What its JSON takes to make, in characters of a prompt to tokenise."""
        num_numbers = 0 if self.embedding is None else len(self.embedding)
        return LOGPROB_WEIGHT * (len(self.logprobs) + len(self.prompt_logprobs)) + 4 * (len(self.texts) + num_numbers)

    def saw(self, event: TokenEvent) -> None:
        self.marks += [(self.num_chars + place, id_) for place, id_ in event.marks]
        self.num_chars += len(event.text)
        self.texts.append(event.text)
        self.logprobs.extend(event.logprobs or ())
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.embedding = event.embedding
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason


WholeText = Callable[[Sequence[Choice], CallProgress], str]


class Shape(Protocol):
    """Makes the JSON of OpenAI's chats or completions; what is the same in each chunk is made once."""

    def whole_head(self) -> str:
        """An answer that is not streamed, up to the members of `choices`."""

    def whole(self, index: int, choice: Choice) -> str:
        """One member of its `choices`."""

    def head(self) -> str:
        """A chunk up to the members of `choices`, without the closing brackets."""

    def choices(self, index: int, event: TokenEvent) -> Sequence[str]:
        """One choice object for each chunk that this event makes."""


def choices_text(shape: Shape, choices: Sequence[Choice], progress: CallProgress) -> str:
    """The answer of OpenAI's chats and completions."""
    members = ",".join(shape.whole(index, choice) for index, choice in enumerate(choices))
    return f'{shape.whole_head()}{members}],"usage":{json_text(progress.usage())}}}'


async def whole_answer(context: ApiContext, call: Call, receive: Receive, text: WholeText) -> Response:
    """The call's answer, billed once it is sent. Raises ApiError when a sequence fails, ClientGone after a hang-up."""
    progress = CallProgress(call)
    choices = await _collect(context, call, progress, receive)

    def render() -> bytes:
        return text(choices, progress).encode("ascii")

    async def bill() -> None:  # a plain function would run on a thread
        progress.bill(context.usage)

    body = await inline_or_heavy(context, call.target.tenant, sum(choice.weight for choice in choices), render)
    headers = call.target.headers
    return Response(body, headers=headers, media_type="application/json", background=BackgroundTask(bill))


async def _collect(context: ApiContext, call: Call, progress: CallProgress, receive: Receive) -> list[Choice]:
    choices = [Choice() for _ in call.requests]
    async with submitted(context, call, progress) as generation, hang_up_watched(receive, generation.inbox):
        async for events in generation.batches():
            for index, event in events:
                choices[index].saw(event)
    return choices

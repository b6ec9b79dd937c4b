"""One HTTP call for text, ready to run: the noun between a checked body and the engine. Knows no schema of a body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.api.context import ApiContext
from server.api.edge.meters import Admitted
from server.api.target import Target
from server.engine.request import Request
from server.engine.text.answer_reader import AnswerForm

_INLINE_WEIGHT = 4096  # what takes about as long as handing it to a thread and back

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StreamUsage:
    """How much usage a stream reports: at_end, one last chunk for the whole call; in_chunks, so far on every chunk."""

    at_end: bool = False
    in_chunks: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """Sequence i answers prompt i // num_choices and is the answer's choice i.

    admission: what the quota gave before the body was read. stream: None for an answer in one piece. echoes: the text
    of each prompt, if the answer repeats it. form: what a chat's answer may hold beside text; None: nothing.
    """

    id: str
    created: int
    target: Target
    prompts: Sequence[list[int]]
    num_choices: int
    requests: Sequence[Request]
    admission: Admitted | None = None
    stream: StreamUsage | None = None
    echoes: Sequence[str] | None = None
    form: AnswerForm | None = None

    def prompt(self, index: int) -> list[int]:
        """Of sequence `index`."""
        return self.prompts[index // self.num_choices]

    @property
    def num_prompts_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def max_tokens(self) -> int:
        """The most this call can use, prompts and answers."""
        return self.num_prompts_tokens + sum(request.params.max_tokens for request in self.requests)

    @property
    def has_logprobs(self) -> bool:
        return self.requests[0].params.logprobs is not None


async def inline_or_heavy(context: ApiContext, tenant: str, weight: int, work: Callable[[], T]) -> T:
    """What `work` returns, done on a thread if it is long: the streams of others do not wait for it.

    weight: characters of text or token ids to be looked at, or what takes as long.
    """
    return work() if weight <= _INLINE_WEIGHT else await context.heavy.run(tenant, work)

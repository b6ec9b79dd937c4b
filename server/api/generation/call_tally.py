"""Tells the ledger what one HTTP call has been given, piece by piece. Counts nothing itself: `usage` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.background import BackgroundTask
from starlette.responses import Response

from adapters_store.accounts.usage import UsageCounts
from server.api.context import ApiContext
from server.api.generation.call import inline_or_heavy
from server.api.generation.usage import Usage
from server.api.generation.whole import Choice
from server.api.target import Target
from server.api.telemetry.usage_ledger import UsageLedger
from server.api.wire.json_text import json_text


class CallTally:
    """One HTTP call's part of the ledger: `sent()` after each piece that was handed to the client."""

    def __init__(self, ledger: UsageLedger, target: Target, usage: Usage) -> None:
        self._ledger = ledger
        self._target = target
        self._usage = usage
        self._told = UsageCounts()

    def sent(self) -> None:
        now, told = self._usage.counts(), self._told
        self._ledger.add(
            self._target.tenant,
            self._target.label,
            UsageCounts(
                now.requests - told.requests,
                now.prompt_tokens - told.prompt_tokens,
                now.cached_tokens - told.cached_tokens,
                now.output_tokens - told.output_tokens,
            ),
        )
        self._told = now

    async def sent_whole(self) -> None:
        """Awaited by the response once it is sent; a plain function would be run on a thread."""
        self.sent()


class WholeShape(Protocol):
    """Makes the JSON text of an answer that is not streamed."""

    def whole_head(self) -> str:
        """The answer up to the members of `choices`."""

    def whole(self, index: int, choice: Choice) -> str:
        """One member of `choices`."""


async def whole_answer(
    context: ApiContext, target: Target, usage: Usage, shape: WholeShape, choices: Sequence[Choice]
) -> Response:
    """The answer of a call that is not streamed, billed once it is sent."""

    def render() -> bytes:
        members = ",".join(shape.whole(index, choice) for index, choice in enumerate(choices))
        return f'{shape.whole_head()}{members}],"usage":{json_text(usage.total())}}}'.encode("ascii")

    weight = sum(choice.weight for choice in choices)
    body = await inline_or_heavy(context, target.tenant, weight, render)
    billing = BackgroundTask(CallTally(context.usage, target, usage).sent_whole)
    return Response(body, headers=target.headers, media_type="application/json", background=billing)

"""Tells the ledger what one HTTP call has been given, piece by piece. Counts nothing itself: `usage` does."""

from __future__ import annotations

from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response

from adapters_store.usage import UsageCounts
from server.api.context import ApiContext
from server.api.json_text import json_bytes
from server.api.model_ref import Target
from server.api.usage import Usage
from server.api.usage_ledger import UsageLedger


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


def whole_answer(context: ApiContext, target: Target, usage: Usage, answer: dict[str, Any]) -> Response:
    """The answer of a call that is not streamed, billed once it is sent."""
    tally = CallTally(context.usage, target, usage)
    body = json_bytes({**answer, "usage": usage.total()})
    billing = BackgroundTask(tally.sent_whole)
    return Response(body, headers=target.headers, media_type="application/json", background=billing)

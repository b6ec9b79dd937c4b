"""Sends a generation as server-sent events, as it happens. Knows when to send what; the shapes are the route's.

Headers wait for the first event, so a failure before it is answered with its proper status. After that a failure is
one event with an error body; in OpenAI's chats and completions [DONE] follows, so that clients that wait for it finish
too. With keep-alive comments, the first comment counts as the first event.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.context import ApiContext
from server.api.edge.event_bridge import IndexedEvent
from server.api.generation.call import Call, StreamUsage, inline_or_heavy
from server.api.generation.generation import Generation, hang_up_watched, submitted
from server.api.generation.parts.progress import CallProgress, usage_of_sequence
from server.api.generation.schemas import GenerationBody
from server.api.generation.whole import LOGPROB_WEIGHT, Shape
from server.api.wire.errors import ApiError, ClientGone
from server.api.wire.json_text import json_string, json_text
from server.engine.request import InvalidRequest, TokenEvent

_DONE = "data: [DONE]\n\n"
_KEEP_ALIVE = ": keep-alive\n\n"


class EventWriter(Protocol):
    """Makes the server-sent events of one stream."""

    def chunks(self, index: int, event: TokenEvent) -> str:
        """Those of one event of sequence `index`."""

    def closing(self) -> str:
        """The last ones of a stream that went well."""

    def failed(self, error: ApiError) -> str:
        """The last ones of a stream that had begun when this happened."""


class ChunkWriter:
    """OpenAI's chunks of chats and completions, with as much usage as the call's stream options ask for."""

    def __init__(self, call: Call, shape: Shape, progress: CallProgress) -> None:
        self._call = call
        self._shape = shape
        self._progress = progress
        self._head = f"data: {shape.head()}"
        self._reports = call.stream or StreamUsage()

    def chunks(self, index: int, event: TokenEvent) -> str:
        tail = self._tail(index, event)
        return "".join(f"{self._head}[{choice}]{tail}" for choice in self._shape.choices(index, event))

    def closing(self) -> str:
        if not self._reports.at_end:
            return _DONE
        return f'{self._head}[],"usage":{json_text(self._progress.usage())}}}\n\n{_DONE}'

    def failed(self, error: ApiError) -> str:
        return f"data: {json_text(error.body)}\n\n{_DONE}"

    def _tail(self, index: int, event: TokenEvent) -> str:
        if self._reports.in_chunks:
            return f',"usage":{json_text(usage_of_sequence(self._call, index, event))}}}\n\n'
        return ',"usage":null}\n\n' if self._reports.at_end else "}\n\n"


class TokenStream(Response):
    """A response that runs its generation while it is being sent; a client that hangs up ends it."""

    media_type = "text/event-stream"

    def __init__(self, context: ApiContext, call: Call, writer: EventWriter, progress: CallProgress) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **call.target.headers})
        del self.headers["content-length"]
        self._context = context
        self._call = call
        self._progress = progress
        self._writer = writer
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with (
            submitted(self._context, self._call, self._progress) as generation,
            hang_up_watched(receive, generation.inbox),
        ):
            await self._send_generation(generation, send)

    async def _send_generation(self, generation: Generation, send: Send) -> None:
        try:
            patience_s = self._context.settings.sse_keep_alive_s or None
            await self._send_events(generation.batches(patience_s), send)
            last = self._writer.closing()
        except ClientGone:
            if not self._is_started:
                raise
            return
        except ApiError as error:
            if not self._is_started:
                raise
            last = self._writer.failed(error)
        await send(_body(last, more=False))
        self._progress.bill(self._context.usage)

    async def _send_events(self, batches: AsyncIterator[list[IndexedEvent]], send: Send) -> None:
        async for events in batches:
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            text = await self._rendered(events)
            if text or not events:
                await send(_body(text or _KEEP_ALIVE, more=True))
                self._progress.bill(self._context.usage)

    async def _rendered(self, events: Sequence[IndexedEvent]) -> str:
        """The first event of a sequence may hold the log-probabilities of a whole prompt."""
        chunks = self._writer.chunks
        weight = LOGPROB_WEIGHT * sum(len(event.prompt_logprobs or ()) for _, event in events)
        return await inline_or_heavy(
            self._context,
            self._call.target.tenant,
            weight,
            lambda: "".join([chunks(index, event) for index, event in events]),
        )


def chunk_stream(context: ApiContext, call: Call, shape: Shape) -> TokenStream:
    """In chunks of OpenAI's chats and completions."""
    progress = CallProgress(call)
    return TokenStream(context, call, ChunkWriter(call, shape, progress), progress)


def _body(text: str, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": text.encode("ascii"), "more_body": more}


def check_stream_options(body: GenerationBody) -> None:
    """Raises InvalidRequest for stream_options without stream."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "stream_options is allowed only with stream true")


def finish_json(reason: str | None) -> str:
    return "null" if reason is None else json_string(reason)

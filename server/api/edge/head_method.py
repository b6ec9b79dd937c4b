"""HEAD wherever there is GET: the same answer without its body. Knows no route."""

from __future__ import annotations

from anyio import CancelScope
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware. The app sees GET; the layers around see HEAD, and the route that answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            with CancelScope() as rest:
                await self._app(asked, receive, _without_body(send, rest))
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]


def _without_body(send: Send, rest: CancelScope) -> Send:
    """The answer is complete once its head is sent. The body is dropped and the app ends, or it would read a whole
    file for it."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif not rest.cancel_called:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            rest.cancel()

    return send_head

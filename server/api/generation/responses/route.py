"""POST /v1/responses: OpenAI's newer request for text, answered as a chat is. Nothing is stored."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from server.api.auth import guarded
from server.api.context import ContextDep
from server.api.generation.admission import BeforeBodyDep
from server.api.generation.chat import chat_call
from server.api.generation.fields.renamed import renamed_fields
from server.api.generation.parts.progress import CallProgress
from server.api.generation.responses.answer import ResponseEvents, whole_text
from server.api.generation.responses.schemas import FIELDS, ResponsesBody
from server.api.generation.streaming import TokenStream
from server.api.generation.whole import whole_answer
from server.api.request_body import json_body
from server.api.wire.json_body import body_schema

BodyDep = Annotated[ResponsesBody, Depends(json_body(ResponsesBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))


@router.post("/v1/responses", openapi_extra=body_schema(ResponsesBody), response_class=Response)
async def create_response(request: Request, before: BeforeBodyDep, context: ContextDep, body: BodyDep) -> Response:
    """Answer an input."""
    with renamed_fields(FIELDS):
        call = await chat_call(request, before, context, body.chat(), id_prefix="resp")
    if call.stream is not None:
        progress = CallProgress(call)
        return TokenStream(context, call, ResponseEvents(call, body, progress), progress)
    return await whole_answer(context, call, request.receive, partial(whole_text, call, body))

"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's request for text, answered as a chat is."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from server.api.auth import guarded
from server.api.context import ContextDep
from server.api.generation.admission import BeforeBodyDep
from server.api.generation.build_call import prepared_for
from server.api.generation.chat import chat_call, chat_source, check_chat
from server.api.generation.fields.renamed import renamed_fields
from server.api.generation.messages.answer import MessageEvents, whole_text
from server.api.generation.messages.schemas import FIELDS, MessagesBody, PromptBody
from server.api.generation.parts.progress import CallProgress
from server.api.generation.streaming import TokenStream
from server.api.generation.whole import whole_answer
from server.api.request_body import json_body
from server.api.target import resolve_target
from server.api.wire.json_body import body_schema

MessagesDep = Annotated[MessagesBody, Depends(json_body(MessagesBody, max_bytes=None))]
PromptDep = Annotated[PromptBody, Depends(json_body(PromptBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))


@router.post("/v1/messages", openapi_extra=body_schema(MessagesBody), response_class=Response)
async def create_message(request: Request, before: BeforeBodyDep, context: ContextDep, body: MessagesDep) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    with renamed_fields(FIELDS):
        call = await chat_call(request, before, context, body.chat(), id_prefix="msg")
    if call.stream is not None:
        progress = CallProgress(call)
        return TokenStream(context, call, MessageEvents(call, progress), progress)
    return await whole_answer(context, call, request.receive, partial(whole_text, call))


@router.post("/v1/messages/count_tokens", openapi_extra=body_schema(PromptBody))
async def count_tokens(request: Request, before: BeforeBodyDep, context: ContextDep, body: PromptDep) -> dict[str, int]:
    """How many tokens the prompt of such a message has."""
    with renamed_fields(FIELDS):
        chat = body.chat()
        check_chat(chat)
        source = chat_source(context, chat)
        target = await resolve_target(context, before.caller, chat.model, chat.sticky or request.state.request_id)
        prepared = await prepared_for(context, target, source)
    return {"input_tokens": sum(map(len, prepared.prompts))}

"""POST /v1/chat/completions: a conversation through the base's chat template, answered as OpenAI's chat objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from adapters_store.parsing.strict_json import shown
from server.api.auth import guarded
from server.api.context import ApiContext, ContextDep
from server.api.generation.admission import BeforeBodyDep
from server.api.generation.build_call import PromptSource, TokenBudget, build_call
from server.api.generation.call import Call
from server.api.generation.chat_answer import ChatAnswer
from server.api.generation.chat_plan import check_tools, planned
from server.api.generation.fields.structured_output import asked_grammar
from server.api.generation.parts.logprobs import chat_logprobs
from server.api.generation.schemas import ChatBody
from server.api.generation.streaming import check_stream_options, chunk_stream
from server.api.generation.whole import Choice, choices_text, whole_answer
from server.api.request_body import json_body
from server.api.wire.json_body import body_schema
from server.api.wire.json_text import json_text
from server.engine.request import InvalidRequest, TokenEvent, TokenLogprob

BodyDep = Annotated[ChatBody, Depends(json_body(ChatBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))

_FIRST_DELTA = '{"role":"assistant","content":"","refusal":null}'


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody), response_class=Response)
async def create_chat_completion(
    request: Request, before: BeforeBodyDep, context: ContextDep, body: BodyDep
) -> Response:
    """Answer a conversation."""
    call = await chat_call(request, before, context, body)
    shape = ChatShape(context, call)
    if call.stream is not None:
        return chunk_stream(context, call, shape)
    return await whole_answer(context, call, request.receive, partial(choices_text, shape))


async def chat_call(
    request: Request, before: BeforeBodyDep, context: ApiContext, body: ChatBody, *, id_prefix: str = "chatcmpl"
) -> Call:
    """Of every route that is answered as a chat is. Raises InvalidRequest."""
    check_chat(body)
    source = chat_source(context, body, id_prefix=id_prefix)
    return await build_call(context, before, body, source, request.state.request_id)


def check_chat(body: ChatBody) -> None:
    """Raises InvalidRequest for fields that do not go together."""
    check_stream_options(body)
    check_tools(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", "top_logprobs is allowed only with logprobs true")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        asked = f"max_tokens is {shown(body.max_tokens)}, max_completion_tokens is {shown(body.max_completion_tokens)}"
        reason = f"{asked}; send only one of them"
        raise InvalidRequest("max_tokens", reason)


def chat_source(context: ApiContext, body: ChatBody, *, id_prefix: str = "chatcmpl") -> PromptSource:
    """Raises InvalidRequest."""
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    asked = asked_grammar(body)
    if asked is not None and body.tools:
        raise InvalidRequest(asked.field, f"{asked.field} and tools constrain the answer both; send only one of them")
    default = context.settings.sampling_defaults.max_tokens
    return PromptSource(
        id_prefix=id_prefix,
        num_prompts=1,
        weight=_weight(body),
        budget=TokenBudget(prompt_field="messages", asked=max_tokens, default=default),
        prepare=lambda target: planned(context, body, target, asked),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        end_ids=tuple(context.engine.tokenizer.chat_end_ids),
    )


def _weight(body: ChatBody) -> int:
    tools = sum(tool.weight for tool in body.tools or ())
    return sum(message.weight for message in body.messages) + tools + len(body.logit_bias or ())


class ChatShape:
    """How this call's sequences look, whole or in chunks."""

    def __init__(self, context: ApiContext, call: Call) -> None:
        self._token_texts = context.engine.tokenizer.token_texts
        self._has_logprobs = call.has_logprobs
        self._has_role = [False] * len(call.requests)
        self._answers = [ChatAnswer(call.form) for _ in call.requests]
        self._common: dict[str, Any] = {
            "id": call.id,
            "created": call.created,
            "model": call.target.model,
            "system_fingerprint": context.fingerprint,
        }

    def whole_head(self) -> str:
        return f'{json_text({"object": "chat.completion", **self._common})[:-1]},"choices":['

    def whole(self, index: int, choice: Choice) -> str:
        answer = self._answers[index]
        spoken = answer.message([*answer.deltas(choice.text, choice.marks), *answer.last_deltas()])
        message: dict[str, Any] = {"role": "assistant", **spoken, "refusal": None, "annotations": []}
        finish_reason = answer.finish_reason(choice.finish_reason)
        ended = f'"logprobs":{self._logprobs(choice.logprobs)},"finish_reason":{json_text(finish_reason)}'
        return f'{{"index":{index},"message":{json_text(message)},{ended}}}'

    def head(self) -> str:
        return f'{json_text({"object": "chat.completion.chunk", **self._common})[:-1]},"choices":'

    def choices(self, index: int, event: TokenEvent) -> Sequence[str]:
        """The role, once; then text as it comes; then the finish reason in a chunk of its own."""
        chunks = []
        if not self._has_role[index]:
            self._has_role[index] = True
            chunks.append(_chunk(index, _FIRST_DELTA, "null", "null"))
        logprobs = self._logprobs(event.logprobs or ())
        for delta in self._deltas(index, event):
            chunks.append(_chunk(index, delta, logprobs, "null"))
            logprobs = "null"
        if event.finish_reason is not None:
            finish_reason = self._answers[index].finish_reason(event.finish_reason)
            chunks.append(_chunk(index, "{}", "null", json_text(finish_reason)))
        return chunks

    def _deltas(self, index: int, event: TokenEvent) -> list[str]:
        """The first one carries the event's log-probabilities, so there is one wherever there are any."""
        answer = self._answers[index]
        deltas = [json_text(delta) for delta in answer.deltas(event.text, event.marks)]
        if not deltas and ((event.token_ids and event.finish_reason is None) or event.logprobs):
            deltas.append('{"content":""}')
        if event.finish_reason is not None:
            deltas += [json_text(delta) for delta in answer.last_deltas()]
        return deltas

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> str:
        return chat_logprobs(self._token_texts, entries) if self._has_logprobs else "null"


def _chunk(index: int, delta: str, logprobs: str, finish_reason: str) -> str:
    return f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'

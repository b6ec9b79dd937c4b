"""POST /v1/completions: prompts as text or token ids, answered as OpenAI's text_completion objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from starlette.responses import Response

from adapters_store.keys import Scope
from adapters_store.strict_json import shown
from server.api.auth import CallerDep, guarded
from server.api.call_tally import whole_answer
from server.api.collect import Choice, collect
from server.api.context import ApiContext, ContextDep
from server.api.deadline import DeadlineDep
from server.api.json_body import body_schema, json_body
from server.api.json_text import json_string, json_text
from server.api.logprobs import CompletionLogprobs, Entries
from server.api.model_ref import Target, resolve_target
from server.api.plan import Call, TokenBudget, check_counts, plan_call, tokens_of
from server.api.sampling import sampling_params
from server.api.schemas_completions import CompletionBody
from server.api.streaming import ChunkWriter, TokenStream, check_stream_options, finish_json
from server.engine.request import TokenEvent, TokenLogprob
from server.engine.sampling_params import InvalidRequest

DEFAULT_MAX_TOKENS = 16

BodyDep = Annotated[CompletionBody, Depends(json_body(CompletionBody))]


async def create_completion(
    request: Request, caller: CallerDep, context: ContextDep, body: BodyDep, deadline_s: DeadlineDep
) -> Response:
    """Complete one or more prompts."""
    _check(body)
    check_counts(context, len(body.prompt), body.num_choices)
    target = await resolve_target(context, caller, body.model, body.sticky or request.state.request_id)
    call = await _plan(context, target, body, deadline_s)
    shape = CompletionShape(context, call, body)
    if body.stream:
        return TokenStream(context, call, ChunkWriter(context, call, shape, body.stream_options))
    choices, usage = await collect(context, call, request.receive)
    answer = {**shape.common, "choices": list(map(shape.whole, range(len(choices)), choices))}
    return whole_answer(context, target, usage, answer)


def _check(body: CompletionBody) -> None:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != body.num_choices:
        raise InvalidRequest("best_of", f"best_of must equal n ({body.num_choices}), got {shown(body.best_of)}")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", "max_tokens must be at least 1 without echo, got 0")


async def _plan(context: ApiContext, target: Target, body: CompletionBody, deadline_s: float | None) -> Call:
    prompts = await _prompt_ids(context, body)
    prompt_logprobs = body.logprobs if body.echo else None
    params = sampling_params(body, context, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    budget = TokenBudget(prompt_field="prompt", asked=body.max_tokens, default=DEFAULT_MAX_TOKENS)
    return plan_call(context, target, body, prompts, kind="cmpl", budget=budget, params=params, deadline_s=deadline_s)


async def _prompt_ids(context: ApiContext, body: CompletionBody) -> list[list[int]]:
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    tokenised = iter(await tokens_of(context, texts, add_special_tokens=body.add_special_tokens is not False))
    return [next(tokenised) if isinstance(prompt, str) else list(prompt) for prompt in body.prompt]


class CompletionShape:
    """How this call's sequences look, whole or in chunks."""

    def __init__(self, context: ApiContext, call: Call, body: CompletionBody) -> None:
        self._tokenizer = context.engine.tokenizer
        self._call = call
        self._body = body
        self._is_echoed = [not body.echo] * len(call.requests)
        self._logprobs = [self._new_logprobs(index) for index in range(len(call.requests))]
        self.common: dict[str, Any] = {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.target.model,
            "system_fingerprint": context.fingerprint,
        }

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo(index) + choice.text,
            "logprobs": self._block(index, choice.prompt_logprobs, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def head(self) -> str:
        return f'{json_text(self.common)[:-1]},"choices":'

    def choices(self, index: int, event: TokenEvent) -> Sequence[str]:
        if not event.token_ids and event.finish_reason is None:
            return ()
        text = json_string(self._echo(index) + event.text)
        block = self._block(index, event.prompt_logprobs or (), event.logprobs or ())
        logprobs = "null" if block is None else json_text(block)
        return (f'{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":{finish_json(event)}}}',)

    def _echo(self, index: int) -> str:
        """The prompt's text, before a choice's first piece."""
        if self._is_echoed[index]:
            return ""
        self._is_echoed[index] = True
        prompt = self._body.prompt[index // self._call.num_choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _block(
        self, index: int, prompt: Sequence[TokenLogprob | None], output: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        logprobs = self._logprobs[index]
        if logprobs is None:
            return None
        entries: Entries = [
            *zip(self._prompt_ids(index), prompt, strict=False),
            *((own.token_id, own) for own in output),
        ]
        return logprobs.block(entries)

    def _new_logprobs(self, index: int) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return CompletionLogprobs(self._tokenizer.pieces, () if self._body.echo else self._prompt_ids(index))

    def _prompt_ids(self, index: int) -> Sequence[int]:
        return self._call.prompts[index // self._call.num_choices]


def register(app: FastAPI) -> None:
    app.add_api_route(
        "/v1/completions",
        create_completion,
        methods=["POST"],
        dependencies=guarded(Scope.INFERENCE),
        openapi_extra=body_schema(CompletionBody),
        response_class=Response,
    )

"""POST /v1/completions: prompts as text or token ids, answered as OpenAI's text_completion objects."""

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
from server.api.generation.build_call import Prepared, PromptSource, TokenBudget, build_call, prompt_ids
from server.api.generation.call import Call
from server.api.generation.fields.structured_output import asked_grammar
from server.api.generation.parts.logprobs import CompletionLogprobs, Entries
from server.api.generation.schemas import CompletionBody
from server.api.generation.streaming import check_stream_options, chunk_stream, finish_json
from server.api.generation.whole import Choice, choices_text, whole_answer
from server.api.request_body import json_body
from server.api.wire.json_body import body_schema
from server.api.wire.json_text import json_string, json_text
from server.engine.request import InvalidRequest, TokenEvent, TokenLogprob

DEFAULT_MAX_TOKENS = 16

BodyDep = Annotated[CompletionBody, Depends(json_body(CompletionBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody), response_class=Response)
async def create_completion(request: Request, before: BeforeBodyDep, context: ContextDep, body: BodyDep) -> Response:
    """Complete one or more prompts."""
    _check(body)
    call = await build_call(context, before, body, _source(context, body), request.state.request_id)
    shape = CompletionShape(context, call)
    if call.stream is not None:
        return chunk_stream(context, call, shape)
    return await whole_answer(context, call, request.receive, partial(choices_text, shape))


def _check(body: CompletionBody) -> None:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != body.num_choices:
        raise InvalidRequest("best_of", f"best_of must equal n ({body.num_choices}), got {shown(body.best_of)}")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", "max_tokens must be at least 1 without echo, got 0")


def _source(context: ApiContext, body: CompletionBody) -> PromptSource:
    budget = TokenBudget(prompt_field="prompt", asked=body.max_tokens, default=DEFAULT_MAX_TOKENS)
    has_special, asked = body.add_special_tokens is not False, asked_grammar(body)
    return PromptSource(
        id_prefix="cmpl",
        num_prompts=len(body.prompt),
        weight=sum(map(len, body.prompt)) + len(body.logit_bias or ()) * len(body.prompt),
        budget=budget,
        prepare=lambda _: Prepared(
            prompt_ids(context, body.prompt, budget, add_special_tokens=has_special), grammar=asked
        ),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        echo=partial(_echoes, context, body) if body.echo else None,
    )


def _echoes(context: ApiContext, body: CompletionBody, prompts: Sequence[list[int]]) -> list[str]:
    """The prompts' texts. Raises InvalidRequest if all choices together would repeat too much."""
    limit, decode = context.settings.max_echo_chars // body.num_choices, context.engine.tokenizer.decode
    texts, num_chars = [], 0
    for prompt, ids in zip(body.prompt, prompts, strict=True):
        texts.append(prompt if isinstance(prompt, str) else decode(ids))
        num_chars += len(texts[-1])
        if num_chars > limit:
            reason = f"echo: at most {context.settings.max_echo_chars} characters of prompts (x n) are repeated"
            raise InvalidRequest("echo", reason)
    return texts


class CompletionShape:
    """How this call's sequences look, whole or in chunks."""

    def __init__(self, context: ApiContext, call: Call) -> None:
        self._token_texts = context.engine.tokenizer.token_texts
        self._call = call
        self._is_echoed = [call.echoes is None] * len(call.requests)
        self._logprobs = [self._new_logprobs(index) for index in range(len(call.requests))]
        self._common: dict[str, Any] = {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.target.model,
            "system_fingerprint": context.fingerprint,
        }

    def whole_head(self) -> str:
        return f"{self.head()}["

    def whole(self, index: int, choice: Choice) -> str:
        reported = choice.prompt_logprobs, choice.logprobs
        return self._choice(index, choice.text, *reported, finish_json(choice.finish_reason))

    def head(self) -> str:
        return f'{json_text(self._common)[:-1]},"choices":'

    def choices(self, index: int, event: TokenEvent) -> Sequence[str]:
        if not event.token_ids and event.finish_reason is None:
            return ()
        reported = event.prompt_logprobs or (), event.logprobs or ()
        return (self._choice(index, event.text, *reported, finish_json(event.finish_reason)),)

    def _choice(
        self,
        index: int,
        text: str,
        prompt: Sequence[TokenLogprob | None],
        output: Sequence[TokenLogprob],
        finish_reason: str,
    ) -> str:
        shown, logprobs = json_string(self._echo(index) + text), self._block(index, prompt, output)
        return f'{{"index":{index},"text":{shown},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'

    def _echo(self, index: int) -> str:
        """The prompt's text, before a choice's first text."""
        if self._call.echoes is None or self._is_echoed[index]:
            return ""
        self._is_echoed[index] = True
        return self._call.echoes[index // self._call.num_choices]

    def _block(self, index: int, prompt: Sequence[TokenLogprob | None], output: Sequence[TokenLogprob]) -> str:
        logprobs = self._logprobs[index]
        if logprobs is None:
            return "null"
        entries: Entries = [
            *zip(self._call.prompt(index), prompt, strict=False),
            *((own.token_id, own) for own in output),
        ]
        return logprobs.block(entries)

    def _new_logprobs(self, index: int) -> CompletionLogprobs | None:
        if not self._call.has_logprobs:
            return None
        return CompletionLogprobs(self._token_texts, self._call.prompt(index) if self._call.echoes is None else ())

"""POST /v1/completions: prompts as text or token ids, answered as OpenAI's text_completion objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from adapters_store.parsing.strict_json import shown
from server.api.auth import CallerDep, guarded
from server.api.context import ApiContext, ContextDep
from server.api.edge.rate_limits import Admission
from server.api.generation.admission import AdmissionDep, DeadlineDep
from server.api.generation.call import Call, TokenBudget, check_counts, inline_or_heavy, plan_call, tokens_of
from server.api.generation.call_tally import whole_answer
from server.api.generation.logprobs import CompletionLogprobs, Entries
from server.api.generation.sampling import sampling_params
from server.api.generation.schemas import CompletionBody
from server.api.generation.streaming import ChunkWriter, TokenStream, check_stream_options, finish_json
from server.api.generation.whole import Choice, collect
from server.api.request_body import json_body
from server.api.target import Target, resolve_target
from server.api.wire.json_body import body_schema
from server.api.wire.json_text import json_string, json_text
from server.engine.request import InvalidRequest, TokenEvent, TokenLogprob

DEFAULT_MAX_TOKENS = 16

BodyDep = Annotated[CompletionBody, Depends(json_body(CompletionBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody), response_class=Response)
async def create_completion(
    request: Request,
    *,
    caller: CallerDep,
    context: ContextDep,
    deadline_s: DeadlineDep,
    admission: AdmissionDep,
    body: BodyDep,
) -> Response:
    """Complete one or more prompts."""
    _check(body)
    check_counts(context, len(body.prompt), body.num_choices)
    target = await resolve_target(context, caller, body.model, body.sticky or request.state.request_id)
    weight = sum(map(len, body.prompt)) + len(body.logit_bias or ()) * len(body.prompt)
    shape = await inline_or_heavy(
        context, target.tenant, weight, lambda: _plan(context, target, body, deadline_s, admission)
    )
    call = shape.call
    if body.stream:
        return TokenStream(context, call, ChunkWriter(context, call, shape, body.stream_options))
    choices, usage = await collect(context, call, request.receive)
    return await whole_answer(context, target, usage, shape, choices)


def _check(body: CompletionBody) -> None:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != body.num_choices:
        raise InvalidRequest("best_of", f"best_of must equal n ({body.num_choices}), got {shown(body.best_of)}")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", "max_tokens must be at least 1 without echo, got 0")


def _plan(
    context: ApiContext, target: Target, body: CompletionBody, deadline_s: float | None, admission: Admission | None
) -> CompletionShape:
    """The call, and how its sequences look. Any thread."""
    budget = TokenBudget(prompt_field="prompt", asked=body.max_tokens, default=DEFAULT_MAX_TOKENS)
    prompts = _prompt_ids(context, body, budget)
    prompt_logprobs = body.logprobs if body.echo else None
    params = sampling_params(body, context, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    if prompt_logprobs is not None:
        _check_prompt_logprobs(context, sum(map(len, prompts)) * body.num_choices * (prompt_logprobs + 1))
    call = plan_call(
        context,
        target,
        body,
        prompts,
        kind="cmpl",
        budget=budget,
        params=params,
        deadline_s=deadline_s,
        admission=admission,
    )
    return CompletionShape(context, call, body, _echoes(context, body, prompts) if body.echo else [])


def _prompt_ids(context: ApiContext, body: CompletionBody, budget: TokenBudget) -> list[list[int]]:
    for prompt in body.prompt:
        if not isinstance(prompt, str):
            budget.max_tokens(len(prompt), context.engine.max_model_len)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    tokenised = iter(tokens_of(context, texts, budget, add_special_tokens=body.add_special_tokens is not False))
    return [next(tokenised) if isinstance(prompt, str) else list(prompt) for prompt in body.prompt]


def _check_prompt_logprobs(context: ApiContext, count: int) -> None:
    limit = context.settings.max_prompt_logprobs
    if count > limit:
        reason = f"logprobs: at most {limit} log-probabilities of prompts (tokens x n x (logprobs + 1)), got {count}"
        raise InvalidRequest("logprobs", reason)


def _echoes(context: ApiContext, body: CompletionBody, prompts: Sequence[list[int]]) -> list[str]:
    """The prompts' texts. Raises InvalidRequest where all choices together would repeat too much."""
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
    """How this call's sequences look, whole or in chunks. echoes: the text of each prompt, none if not asked for."""

    def __init__(self, context: ApiContext, call: Call, body: CompletionBody, echoes: Sequence[str]) -> None:
        self._tokenizer = context.engine.tokenizer
        self.call = call
        self._body = body
        self._echoes = echoes
        self._is_echoed = [not body.echo] * len(call.requests)
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
        reason = "null" if choice.finish_reason is None else json_string(choice.finish_reason)
        return self._choice(index, choice.text, choice.prompt_logprobs, choice.logprobs, reason)

    def head(self) -> str:
        return f'{json_text(self._common)[:-1]},"choices":'

    def choices(self, index: int, event: TokenEvent) -> Sequence[str]:
        if not event.token_ids and event.finish_reason is None:
            return ()
        reported = event.prompt_logprobs or (), event.logprobs or ()
        return (self._choice(index, event.text, *reported, finish_json(event)),)

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
        """The prompt's text, before a choice's first piece."""
        if self._is_echoed[index]:
            return ""
        self._is_echoed[index] = True
        return self._echoes[index // self.call.num_choices]

    def _block(self, index: int, prompt: Sequence[TokenLogprob | None], output: Sequence[TokenLogprob]) -> str:
        logprobs = self._logprobs[index]
        if logprobs is None:
            return "null"
        entries: Entries = [
            *zip(self._prompt_ids(index), prompt, strict=False),
            *((own.token_id, own) for own in output),
        ]
        return logprobs.block(entries)

    def _new_logprobs(self, index: int) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return CompletionLogprobs(self._tokenizer.token_texts, () if self._body.echo else self._prompt_ids(index))

    def _prompt_ids(self, index: int) -> Sequence[int]:
        return self.call.prompts[index // self.call.num_choices]

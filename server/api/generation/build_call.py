"""Builds a Call from a checked body: target, tokens, parameters, limits, deadline, in this order.

After it nothing reads the body. Fields that only one route has come as a `PromptSource`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from uuid import uuid4

from adapters_store.format.invocation import last_place
from adapters_store.parsing.numbers import whole_number
from adapters_store.parsing.strict_json import shown
from server.api.context import ApiContext
from server.api.engine_client import EngineClient
from server.api.generation.admission import BeforeBody
from server.api.generation.call import Call, StreamUsage, inline_or_heavy
from server.api.generation.schemas import GenerationBody, Prompt, StreamOptions
from server.api.target import Target, resolve_target
from server.api.wire.model_field import WeightedName
from server.engine.grammar.compiler import AskedGrammar, CompiledGrammar
from server.engine.request import InvalidRequest, Request, SamplingParams
from server.engine.text.answer_reader import AnswerForm

_SEED_RANGE = 2**63
_OWN_TEMPLATE_WEIGHT = 1 << 14  # another process renders it, which the event loop cannot wait for


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """asked: what the client set, None for the default. default None means up to the context length."""

    prompt_field: str
    asked: int | None
    default: int | None

    def max_tokens(self, num_prompt_tokens: int, max_model_len: int) -> int:
        """Raises InvalidRequest `context_length_exceeded` when prompt and asked tokens do not fit together."""
        num_left = max_model_len - num_prompt_tokens
        if num_left < (1 if self.asked is None else self.asked):
            field = self.prompt_field
            completion = "" if self.asked is None else f" and {shown(self.asked)} for the completion"
            message = (
                f"{field}: the context length is {max_model_len} tokens, "
                f"got {num_prompt_tokens} in the prompt{completion}"
            )
            raise InvalidRequest(field, message, code="context_length_exceeded")
        if self.asked is not None:
            return self.asked
        return num_left if self.default is None else min(self.default, num_left)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every route's body has. params: everything but max_tokens; may run on any thread."""

    model: str | Sequence[WeightedName]
    sticky: str | None
    params: Callable[[], SamplingParams]
    num_choices: int = 1
    stream: StreamUsage | None = None


@dataclass(frozen=True)
class Prepared:
    """prompts: their tokens. form: what a chat's answer may hold beside text. grammar: what the answers must follow."""

    prompts: list[list[int]]
    form: AnswerForm | None = None
    grammar: AskedGrammar | None = None


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """The prompts of one route's body. Its functions may run on any thread, and raise InvalidRequest.

    id_prefix: of the answer's id. weight: what it takes to tokenise, in characters. echo: the prompts' texts, from
    their tokens; None if the answer does not repeat them. end_ids: tokens that end an answer besides the base's own.
    """

    id_prefix: str
    num_prompts: int
    weight: int
    budget: TokenBudget
    prepare: Callable[[Target], Prepared]
    logprobs: int | None
    prompt_logprobs: int | None = None
    echo: Callable[[Sequence[list[int]]], list[str]] | None = None
    end_ids: tuple[int, ...] = ()


async def build_call(
    context: ApiContext, before: BeforeBody, body: GenerationBody, source: PromptSource, request_id: str
) -> Call:
    """Raises ApiError or InvalidRequest; nothing has been submitted yet."""
    asked = Asked(
        model=body.model,
        sticky=body.sticky,
        params=lambda: _sampling_params(context, body, source),
        num_choices=body.num_choices,
        stream=_stream_usage(body),
    )
    return await call_of(context, before, asked, source, request_id)


async def call_of(context: ApiContext, before: BeforeBody, asked: Asked, source: PromptSource, request_id: str) -> Call:
    """As build_call, for any body."""
    _check_counts(context, source, asked.num_choices)
    target = await resolve_target(context, before.caller, asked.model, asked.sticky or request_id)
    prepared = await prepared_for(context, target, source)
    prompts = prepared.prompts
    grammar = await _compiled(context, target.tenant, prepared.grammar)

    def build() -> Call:
        params = asked.params()
        if prepared.form is not None:
            params = replace(params, mark_ids=prepared.form.mark_ids, reasoning=prepared.form.reasoning_ids)
        _check_prompt_logprobs(context, params, sum(map(len, prompts)) * asked.num_choices)
        call_id = f"{source.id_prefix}-{uuid4().hex}"
        requests = _requests(
            context,
            prompts,
            target=target,
            budget=source.budget,
            params=params,
            num_choices=asked.num_choices,
            call_id=call_id,
            deadline_s=before.deadline_s,
            grammar=grammar,
        )
        return Call(
            id=call_id,
            created=int(time.time()),
            target=target,
            prompts=prompts,
            num_choices=asked.num_choices,
            requests=requests,
            admission=before.admission,
            stream=asked.stream,
            echoes=None if source.echo is None else source.echo(prompts),
            form=prepared.form,
        )

    return await inline_or_heavy(context, target.tenant, source.weight, build)


async def prepared_for(context: ApiContext, target: Target, source: PromptSource) -> Prepared:
    """The source's prompts for this target. Raises InvalidRequest."""
    weight = source.weight + (_OWN_TEMPLATE_WEIGHT if target.chat_template is not None else 0)
    return await inline_or_heavy(context, target.tenant, weight, lambda: source.prepare(target))


async def _compiled(context: ApiContext, tenant: str, asked: AskedGrammar | None) -> CompiledGrammar | None:
    """Raises InvalidRequest. What the tenant has not sent lately is compiled off the event loop."""
    if asked is None:
        return None
    known = context.grammars.known(tenant, asked)
    return known or await context.heavy.run(tenant, lambda: context.grammars.compiled(tenant, asked))


def prompt_ids(
    context: ApiContext, prompts: Sequence[Prompt], budget: TokenBudget, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Tokens of texts, and token ids as they are. Raises InvalidRequest, at the first prompt that does not fit; cheap
    checks come first."""
    max_model_len, encode = context.engine.max_model_len, context.engine.tokenizer.encode
    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(context, budget.prompt_field, len(prompt))
        else:
            budget.max_tokens(len(prompt), max_model_len)
    encoded: list[list[int]] = []
    for prompt in prompts:
        ids = encode(prompt, add_special_tokens=add_special_tokens) if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str):
            budget.max_tokens(len(ids), max_model_len)
        encoded.append(ids)
    return encoded


def check_length(context: ApiContext, field: str, num_chars: int) -> None:
    """Refuses what cannot fit before spending time on its tokens. Raises InvalidRequest."""
    limit = context.engine.max_model_len * context.settings.max_chars_per_token
    if num_chars > limit:
        message = f"{field} must have at most {limit} characters, got {num_chars}"
        raise InvalidRequest(field, message, code="context_length_exceeded")


def _sampling_params(context: ApiContext, body: GenerationBody, source: PromptSource) -> SamplingParams:
    """Everything but max_tokens, which depends on the prompt. A field that the client leaves out has the operator's
    default, else the API's. Raises InvalidRequest."""
    engine = context.engine
    engine.vocabulary.check(body.stop_token_ids or (), "stop_token_ids")
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
    }
    chosen = context.settings.sampling_defaults.given | {key: each for key, each in given.items() if each is not None}
    chosen["max_tokens"] = engine.max_model_len
    return SamplingParams(
        **chosen,
        seed=body.seed,
        logit_bias=_logit_bias(body.logit_bias or {}, engine),
        logprobs=source.logprobs,
        prompt_logprobs=source.prompt_logprobs,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos or False,
        end_ids=source.end_ids,
    )


def _logit_bias(bias: dict[str, float], engine: EngineClient) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        token_id = whole_number(key)
        if token_id is None:
            raise InvalidRequest("logit_bias", f"logit_bias: each key must be a token id, got {shown(key, 40)}")
        pairs.append((token_id, float(value)))
    engine.vocabulary.check([token_id for token_id, _ in pairs], "logit_bias")
    return tuple(pairs)


def _check_counts(context: ApiContext, source: PromptSource, num_choices: int) -> None:
    settings, num_prompts = context.settings, source.num_prompts
    for field, what, count, limit in (
        (source.budget.prompt_field, "prompts", num_prompts, settings.max_prompts),
        ("n", "choices", num_choices, settings.max_choices),
        ("n", "sequences (prompts x n)", num_prompts * num_choices, settings.max_sequences),
    ):
        if count > limit:
            raise InvalidRequest(field, f"{field}: at most {limit} {what} in one call, got {shown(count)}")


def _check_prompt_logprobs(context: ApiContext, params: SamplingParams, num_tokens: int) -> None:
    if params.prompt_logprobs is None:
        return
    count, limit = num_tokens * (params.prompt_logprobs + 1), context.settings.max_prompt_logprobs
    if count > limit:
        reason = f"logprobs: at most {limit} log-probabilities of prompts (tokens x n x (logprobs + 1)), got {count}"
        raise InvalidRequest("logprobs", reason)


def _requests(
    context: ApiContext,
    prompts: Sequence[list[int]],
    *,
    target: Target,
    budget: TokenBudget,
    params: SamplingParams,
    num_choices: int,
    call_id: str,
    deadline_s: float | None,
    grammar: CompiledGrammar | None,
) -> list[Request]:
    """Raises InvalidRequest, also for a token id that the model cannot read, whether the client sent it or a text holds
    its token."""
    own_params = cache(lambda max_tokens, seed: replace(params, max_tokens=max_tokens, seed=seed))
    requests: list[Request] = []
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest(budget.prompt_field, f"{budget.prompt_field} must have at least 1 token, got 0")
        max_tokens = budget.max_tokens(len(prompt), context.engine.max_model_len)
        context.engine.vocabulary.check(prompt, budget.prompt_field)  # after its length: that bounds the cost
        active_from = _active_from(prompt, target, budget.prompt_field)
        for choice in range(num_choices):
            request = Request(
                id=f"{call_id}-{len(requests)}",
                tenant=target.tenant,
                prompt_ids=prompt,
                params=own_params(max_tokens, _seed_of(params.seed, choice)),
                adapter=target.adapter,
                adapter_name=None if target.adapter is None else f"{target.tenant}/{target.label}",
                arrival_s=time.monotonic(),
                weight=target.quotas.weight,
                price=1.0 + context.settings.rank_surcharge * target.rank,
                deadline_s=deadline_s,
                active_from=active_from,
                constraint=None if grammar is None else grammar.start(_ending_ids(context.engine, params)),
            )
            requests.append(request)
    return requests


def _active_from(prompt: Sequence[int], target: Target, field: str) -> int:
    """The position of the first token that the adapter changes: 0, or where an activated LoRA's tokens begin.

    As PEFT does, the last place of the tokens counts. PEFT lets the base answer a prompt without them; that would hide
    a mistake. field: the prompt's, in the request's body.

    Raises InvalidRequest (invocation_missing).
    """
    if target.invocation_tokens is None:
        return 0
    found = last_place(prompt, target.invocation_tokens)
    if found is None:
        wanted = shown(list(target.invocation_tokens))
        message = (
            f"{field} must hold the tokens that switch the adapter {shown(target.model)} on (alora_invocation_tokens: "
            f"{wanted}); for an answer without it ask the base model"
        )
        raise InvalidRequest(field, message, code="invocation_missing")
    return found


def _ending_ids(engine: EngineClient, params: SamplingParams) -> frozenset[int]:
    """Tokens that end this answer."""
    return frozenset() if params.ignore_eos else engine.tokenizer.eos_ids.union(params.end_ids)


def _seed_of(seed: int | None, choice: int) -> int | None:
    """Choices of one seeded call differ from each other, and are the same in every such call."""
    return None if seed is None else (seed + choice) % _SEED_RANGE


def _stream_usage(body: GenerationBody) -> StreamUsage | None:
    if not body.stream:
        return None
    options = body.stream_options or StreamOptions()
    return StreamUsage(at_end=bool(options.include_usage), in_chunks=bool(options.continuous_usage_stats))

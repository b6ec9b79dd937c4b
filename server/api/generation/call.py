"""Turns a checked body into the engine's requests: prompts to tokens, n choices to n sequences, and their budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar
from uuid import uuid4

from adapters_store.parsing.strict_json import shown
from server.api.context import ApiContext
from server.api.edge.rate_limits import Admission
from server.api.generation.schemas import GenerationBody
from server.api.target import Target
from server.engine.request import InvalidRequest, Request, SamplingParams
from server.engine.text.chat_options import ChatOptions

_INLINE_WEIGHT = 4096  # what takes about as long as handing it to a thread and back
_SEED_RANGE = 2**63

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP call, ready to run. Sequence i answers prompt i // num_choices and is the answer's choice i."""

    id: str
    created: int
    target: Target
    prompts: Sequence[list[int]]
    num_choices: int
    requests: Sequence[Request]
    admission: Admission | None = None

    def num_prompt_tokens(self, index: int) -> int:
        return len(self.prompts[index // self.num_choices])

    @property
    def num_prompts_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def max_tokens(self) -> int:
        """The most this call can use, prompts and answers."""
        return self.num_prompts_tokens + sum(request.params.max_tokens for request in self.requests)


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """asked: what the client set, None for the default. default None means up to the context length."""

    prompt_field: str
    asked: int | None
    default: int | None

    def max_tokens(self, num_prompt_tokens: int, max_model_len: int) -> int:
        """Raises InvalidRequest `context_length_exceeded` when prompt and asked tokens do not fit together."""
        room = max_model_len - num_prompt_tokens
        if room < (1 if self.asked is None else self.asked):
            raise _context_exceeded(self.prompt_field, num_prompt_tokens, self.asked, max_model_len)
        if self.asked is not None:
            return self.asked
        return room if self.default is None else min(self.default, room)


def _context_exceeded(field: str, num_prompt_tokens: int, asked: int | None, limit: int) -> InvalidRequest:
    completion = "" if asked is None else f" and {shown(asked)} for the completion"
    message = f"{field}: the context length is {limit} tokens, got {num_prompt_tokens} in the prompt{completion}"
    return InvalidRequest(field, message, code="context_length_exceeded")


async def inline_or_heavy(context: ApiContext, tenant: str, weight: int, work: Callable[[], T]) -> T:
    """What `work` returns, done on a thread if it is long: the streams of others do not wait for it.

    weight: characters of text or token ids to be looked at, or what takes as long.
    """
    return work() if weight <= _INLINE_WEIGHT else await context.heavy.run(tenant, work)


def tokens_of(
    context: ApiContext, texts: Sequence[str], budget: TokenBudget, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Prompts as token ids. Raises InvalidRequest, at the first prompt that does not fit."""
    for text in texts:
        _check_length(context, "prompt", len(text))
    prompts = []
    for text in texts:
        prompts.append(context.engine.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        budget.max_tokens(len(prompts[-1]), context.engine.max_model_len)
    return prompts


def chat_tokens_of(context: ApiContext, messages: Sequence[dict[str, str]], options: ChatOptions) -> list[int]:
    """A conversation as token ids. Raises InvalidRequest, also for what the chat template refuses."""
    _check_length(context, "messages", sum(len(message["content"]) for message in messages))
    return context.engine.tokenizer.encode_chat(messages, options)


def _check_length(context: ApiContext, field: str, num_chars: int) -> None:
    """Refuses what cannot fit before spending time on its tokens."""
    limit = context.engine.max_model_len * context.settings.max_chars_per_token
    if num_chars > limit:
        message = f"{field} must have at most {limit} characters, got {num_chars}"
        raise InvalidRequest(field, message, code="context_length_exceeded")


def check_counts(context: ApiContext, num_prompts: int, num_choices: int) -> None:
    """Raises InvalidRequest when one call asks for too many sequences."""
    settings = context.settings
    for field, what, count, limit in (
        ("prompt", "prompts", num_prompts, settings.max_prompts),
        ("n", "choices", num_choices, settings.max_choices),
        ("n", "sequences (prompts x n)", num_prompts * num_choices, settings.max_sequences),
    ):
        if count > limit:
            raise InvalidRequest(field, f"{field}: at most {limit} {what} in one call, got {shown(count)}")


def plan_call(
    context: ApiContext,
    target: Target,
    body: GenerationBody,
    prompts: Sequence[list[int]],
    *,
    kind: str,
    budget: TokenBudget,
    params: SamplingParams,
    deadline_s: float | None = None,
    admission: Admission | None = None,
) -> Call:
    """The engine's requests for these prompts. kind: "cmpl" or "chatcmpl", the prefix of the answer's id.

    deadline_s: in seconds of `time.monotonic`, when the client stops waiting. admission: what the quota gave before the
    body was read. Raises InvalidRequest, also for a token id that the model cannot read, whether the client sent it or
    a text holds its token.
    """
    call_id = f"{kind}-{uuid4().hex}"
    requests: list[Request] = []
    own_params = cache(lambda max_tokens, seed: replace(params, max_tokens=max_tokens, seed=seed))
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest(budget.prompt_field, f"{budget.prompt_field} must have at least 1 token, got 0")
        max_tokens = budget.max_tokens(len(prompt), context.engine.max_model_len)
        context.engine.vocabulary.check(prompt, budget.prompt_field)  # of a prompt that fits: the look is short
        for choice in range(body.num_choices):
            own = own_params(max_tokens, _seed_of(params.seed, choice))
            request = _request(f"{call_id}-{len(requests)}", target, prompt, own)
            request.price = 1.0 + context.settings.rank_surcharge * target.rank
            request.deadline_s = deadline_s
            requests.append(request)
    return Call(
        id=call_id,
        created=int(time.time()),
        target=target,
        prompts=prompts,
        num_choices=body.num_choices,
        requests=requests,
        admission=admission,
    )


def _request(request_id: str, target: Target, prompt: list[int], params: SamplingParams) -> Request:
    return Request(
        id=request_id,
        tenant=target.tenant,
        prompt_ids=prompt,
        params=params,
        adapter=target.adapter,
        adapter_name=None if target.adapter is None else f"{target.tenant}/{target.label}",
        arrival_s=time.monotonic(),
        weight=target.quotas.weight,
    )


def _seed_of(seed: int | None, choice: int) -> int | None:
    """Choices of one seeded call differ from each other, and are the same in every such call."""
    return None if seed is None else (seed + choice) % _SEED_RANGE

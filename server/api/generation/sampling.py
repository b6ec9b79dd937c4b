"""Translates OpenAI's sampling fields, and the usual ones beyond, into SamplingParams. Ranges are checked there."""

from __future__ import annotations

from typing import Any

from adapters_store.parsing.numbers import whole_number
from adapters_store.parsing.strict_json import shown
from server.api.context import ApiContext
from server.api.engine_client import EngineClient
from server.api.generation.schemas import GenerationBody
from server.engine.request import InvalidRequest, SamplingParams


def sampling_params(
    body: GenerationBody,
    context: ApiContext,
    logprobs: int | None,
    prompt_logprobs: int | None,
    end_ids: tuple[int, ...],
) -> SamplingParams:
    """Everything but max_tokens, which depends on the prompt. What a client leaves out is the operator's default,
    else the API's. Raises InvalidRequest.
    """
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
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos or False,
        end_ids=end_ids,
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

"""Translates OpenAI's sampling fields, and the usual ones beyond, into SamplingParams. Ranges are checked there."""

from __future__ import annotations

from typing import Any

from server.api.ports import EngineClient
from server.api.schemas import GenerationBody
from server.engine.sampling_params import InvalidRequest, SamplingParams


def sampling_params(
    body: GenerationBody, engine: EngineClient, *, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Everything but max_tokens, which depends on the prompt. Raises InvalidRequest."""
    engine.vocabulary.check(body.stop_token_ids or (), "stop_token_ids")
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
    }
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},
        seed=body.seed,
        logit_bias=_logit_bias(body.logit_bias or {}, engine),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos or False,
        max_tokens=engine.max_model_len,
    )


def _logit_bias(bias: dict[str, float], engine: EngineClient) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("logit_bias", f"logit_bias: each key must be a token id, got {key[:40]!r}")
    pairs = tuple((int(key), float(value)) for key, value in bias.items())
    engine.vocabulary.check([token_id for token_id, _ in pairs], "logit_bias")
    return pairs

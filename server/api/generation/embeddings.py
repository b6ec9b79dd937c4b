"""POST /v1/embeddings: a vector for each input, by the base or an adapter, in the engine's own batches."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from pydantic import Field
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from server.api.auth import guarded
from server.api.context import ApiContext, ContextDep
from server.api.generation.admission import BeforeBodyDep
from server.api.generation.build_call import Asked, Prepared, PromptSource, TokenBudget, call_of, prompt_ids
from server.api.generation.call import Call
from server.api.generation.parts.progress import CallProgress
from server.api.generation.schemas import Prompts
from server.api.generation.whole import Choice, whole_answer
from server.api.request_body import json_body
from server.api.wire.body import Body, Text
from server.api.wire.json_body import body_schema
from server.api.wire.json_text import json_text
from server.api.wire.model_field import Model
from server.engine.request import InvalidRequest, Pooling, SamplingParams


class EmbeddingsBody(Body):
    """OpenAI's fields, and how the prompt's hidden states become one vector. normalize: to length 1, as OpenAI's are.
    dimensions: the first ones, before that."""

    model: Model
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    user: Text | None = None


BodyDep = Annotated[EmbeddingsBody, Depends(json_body(EmbeddingsBody, max_bytes=None))]

router = APIRouter(dependencies=guarded(Scope.INFERENCE))


@router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingsBody), response_class=Response)
async def create_embeddings(request: Request, before: BeforeBodyDep, context: ContextDep, body: BodyDep) -> Response:
    """Embed one or more inputs."""
    width = context.engine.base.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        reason = f"dimensions: must be at most {width}, the base's hidden size, got {body.dimensions}"
        raise InvalidRequest("dimensions", reason)
    params = SamplingParams(max_tokens=0, pooling=body.pooling or "last")
    asked = Asked(model=body.model, sticky=body.user, params=lambda: params)
    call = await call_of(context, before, asked, _source(context, body), request.state.request_id)
    return await whole_answer(context, call, request.receive, partial(_text, call, body))


def _source(context: ApiContext, body: EmbeddingsBody) -> PromptSource:
    budget = TokenBudget(prompt_field="input", asked=0, default=0)
    has_special = body.add_special_tokens is not False
    return PromptSource(
        id_prefix="embd",
        num_prompts=len(body.input),
        weight=sum(map(len, body.input)),
        budget=budget,
        prepare=lambda _: Prepared(prompt_ids(context, body.input, budget, add_special_tokens=has_special)),
        logprobs=None,
    )


def _text(call: Call, body: EmbeddingsBody, choices: Sequence[Choice], progress: CallProgress) -> str:
    """The answer: one vector for each input, in their order. An embedding has no output tokens."""
    num_tokens = progress.usage()["prompt_tokens"]
    return json_text(
        {
            "object": "list",
            "data": [_entry(index, choice, body) for index, choice in enumerate(choices)],
            "model": call.target.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _entry(index: int, choice: Choice, body: EmbeddingsBody) -> dict[str, Any]:
    assert choice.embedding is not None, "the engine answered without a vector"
    vector = _shaped(choice.embedding, body)
    is_text = body.encoding_format == "base64"
    return {
        "object": "embedding",
        "index": index,
        "embedding": b64encode(vector.astype("<f4").tobytes()).decode() if is_text else vector.tolist(),
    }


def _shaped(vector: NDArray[np.float32], body: EmbeddingsBody) -> NDArray[np.float32]:
    cut = vector[: body.dimensions]
    if body.normalize is False:
        return cut
    length = float(np.linalg.norm(cut.astype(np.float64)))
    return cut / np.float32(length) if length else cut

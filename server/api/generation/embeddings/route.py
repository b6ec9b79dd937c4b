"""POST /v1/embeddings: a vector for each input, by the base or an adapter, in the engine's own batches."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters_store.accounts.keys import Scope
from server.api.auth import guarded
from server.api.context import ApiContext, ContextDep
from server.api.generation.admission import BeforeBodyDep
from server.api.generation.build_call import Asked, Prepared, PromptSource, TokenBudget, call_of, prompt_ids
from server.api.generation.embeddings.answer import embeddings_text
from server.api.generation.embeddings.schemas import EmbeddingsBody
from server.api.generation.whole import whole_answer
from server.api.request_body import json_body
from server.api.wire.json_body import body_schema
from server.engine.request import InvalidRequest, SamplingParams

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
    return await whole_answer(context, call, request.receive, partial(embeddings_text, call, body))


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

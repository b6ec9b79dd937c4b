"""What the embeddings route accepts: OpenAI's fields, and how the prompt's hidden states become one vector."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.api.generation.schemas import Prompts
from server.api.wire.body import Body, Text
from server.api.wire.model_field import Model
from server.engine.request import Pooling


class EmbeddingsBody(Body):
    """normalize: to length 1, as OpenAI's are. dimensions: the first ones, before that."""

    model: Model
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    user: Text | None = None

"""How embeddings look: OpenAI's list, of numbers or of base64 text. Knows no route."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.api.generation.call import Call
from server.api.generation.embeddings.schemas import EmbeddingsBody
from server.api.generation.parts.progress import CallProgress
from server.api.generation.whole import Choice
from server.api.wire.json_text import json_text


def embeddings_text(call: Call, body: EmbeddingsBody, choices: Sequence[Choice], progress: CallProgress) -> str:
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

"""The base's losses on text that is the same for every job: scored once, then remembered beside the bases' digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adapters_store.base import digests
from lora_kernels.native.build import SOURCES
from server.jobs.gate.serving_scorer import ServingScorer
from trainer.data.types import EncodedExample
from trainer.gate.scorer import BASE_ALONE, Losses
from trainer.run_folder.publish import versions

_ENGINE = Path(__file__).parents[2] / "engine"


def base_losses(scorer: ServingScorer, examples: Sequence[EncodedExample]) -> Losses:
    """As scorer.losses of the base alone, by any process of this user with this base, precision, code and packages."""
    [nll] = digests.remembered({_key(scorer, examples): lambda: _scored(scorer, examples)})
    return Losses(np.array(json.loads(nll)), np.array([example.weight for example in examples]))


def _scored(scorer: ServingScorer, examples: Sequence[EncodedExample]) -> str:
    return json.dumps(scorer.losses(examples, scale=BASE_ALONE).nll.tolist())


def _key(scorer: ServingScorer, examples: Sequence[EncodedExample]) -> str:
    """All that the losses follow from."""
    base = scorer.base
    how = {"device": base.device.type, "dtype": str(base.dtype), "nf4": base.quantized, **versions()}
    text = hashlib.sha256(base.description.digest.encode() + json.dumps(how, sort_keys=True).encode())
    for content in _code():
        text.update(content + b"\0")
    for example in examples:
        text.update(example.input_ids.tobytes() + example.weights.tobytes() + b"\0")
    return f"losses:{text.hexdigest()}"


def _code() -> Iterator[bytes]:
    """All of ours that computes losses: our version stays the same from one commit to the next."""
    for folder in (Path(digests.__file__).parent, SOURCES[0].parents[1], _ENGINE, Path(__file__).parent):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".c", ".h"):
                yield file.read_bytes()

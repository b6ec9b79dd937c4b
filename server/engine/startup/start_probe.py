"""Runs two short prompts on a newly loaded base before the server is ready. Knows logits; knows no tenants.

A base with complete files can still be unusable: a NaN in a norm, values that overflow in the served type, weights that
are all zero. Every request would fail, or get the same answer, while the server reports that it is ready.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from adapters_store.base.families import UnsupportedBase
from server.engine.model.base_model import BaseModel
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.text.vocabulary import Vocabulary

_TOKENS = 4  # of each prompt


@torch.inference_mode()
def probe(runner: ModelRunner, vocabulary: Vocabulary, folder: Path) -> None:
    """Raises UnsupportedBase if a logit is NaN or +inf, or if two different prompts give the same logits.

    folder: of the base, read only to find the reason.
    """
    name = runner.base.description.name
    first, second = (_last_logits(runner, ids) for ids in _prompts(vocabulary))
    for logits_W in (first, second):
        if not bool(torch.isfinite(vocabulary.served_logits(logits_W[None]).amax())):
            why = _why(runner.base, folder)
            raise UnsupportedBase(f"{name}: its logits are not finite on a prompt of {_TOKENS} tokens; {why}")
    if torch.equal(first, second):
        raise UnsupportedBase(f"{name}: two different prompts get the same logits; {_why(runner.base, folder)}")


def _prompts(vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids spread over the vocabulary. The two last tokens differ, unless there is only one token."""
    ids = [id_ for id_ in range(vocabulary.size) if id_ not in vocabulary.holes]
    chosen = [ids[index * (len(ids) - 1) // (2 * _TOKENS - 1)] for index in range(2 * _TOKENS)]
    return chosen[:_TOKENS], chosen[_TOKENS:]


def _last_logits(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Logits [W] after the last token, in blocks that are wiped afterwards."""
    block_ids = list(range(-(-len(ids) // runner.cache.block_size)))
    request = Request("probe", "probe", ids, SamplingParams(max_tokens=1), block_ids=block_ids)
    schedule = Schedule([ScheduledRow(request, 0, len(ids))], len(ids), 0)
    logits_W = runner.forward(runner.batch_of(schedule))[-1].clone()
    runner.zero_blocks(block_ids)
    return logits_W


def _why(base: BaseModel, folder: Path) -> str:
    """A hint for the operator: the first stored tensor that is not finite, or that all are finite."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    return f"{name} holds NaN or infinity"
    if base.dtype is not torch.float32:
        return f"every tensor is finite: try --dtype float32, {base.description.dtype} may overflow"
    return "every tensor is finite: the weights may be zero, or not those of this architecture"

"""How much int8 changes what an adapter says: both forms read one short text in one forward. Knows tensors; refuses
nothing, and leaves the engine's cache and adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterRejected
from adapters_store.packed.layout import PackedAdapter
from server.engine.model.adapter_copier import table_of
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.text.tokenizer import Tokenizer
from server.engine.text.vocabulary import Vocabulary

PROBE_TOKENS = 64  # of each form: together a small step, which running requests wait for
TEXT = (
    "The committee met on Tuesday to review the annual report. Most members agreed that costs had risen faster than "
    'income, but they did not agree why.\n\n```python\ndef total(rows):\n    return sum(row["price"] for row in rows)\n'
    '```\n\n{"name": "Ada", "city": "London", "age": 36}\n\nQ: What is the capital of France?\nA: The capital is Paris.'
)
_BLOCK_SIZE = 16

Int8Probe = Callable[[PackedAdapter, PackedAdapter], float]


def int8_probe(base: BaseModel, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Int8Probe:
    """(the adapter in the base's dtype, in int8) -> nats, see `int8_change`. For the engine's thread.

    It raises AdapterRejected (int8_not_measured) if the device has no memory for both beside what it serves."""
    ids = [id_ for id_ in tokenizer.encode(TEXT) if id_ not in vocabulary.unread]
    ids = ids[: min(PROBE_TOKENS, base.max_model_len)]

    def probe(plain: PackedAdapter, small: PackedAdapter) -> float:
        try:
            return int8_change(base, plain, small, ids)
        except torch.OutOfMemoryError:
            needed = (plain.num_bytes + small.num_bytes) >> 20
            message = f"adapter_dtype: int8 is measured in some {needed} MiB of the device's memory, which are not free"
            raise AdapterRejected("int8_not_measured", f"{message}; push it without", param="adapter_dtype") from None

    return probe


@torch.inference_mode()
def int8_change(base: BaseModel, plain: PackedAdapter, small: PackedAdapter, ids: list[int]) -> float:
    """Nats per token, the larger of two: the change of the text's mean log-probability, and the mean divergence
    (Kullback-Leibler) of the next token's distribution. NaN if a logit is not finite. ids: 2 or more.
    """
    num_blocks = -(-len(ids) // _BLOCK_SIZE)
    cache = KVCache.allocate(base, num_blocks=2 * num_blocks, block_size=_BLOCK_SIZE)
    table = table_of(base, [plain, small])
    rows = [_row(ids, slot, num_blocks) for slot in range(2)]
    schedule = Schedule(rows, 2 * len(ids), 0)
    runner = ModelRunner(base, cache, table, Sampler())
    logits_TV = runner.forward(runner.batch_of(schedule)).float()
    before_TV, after_TV = torch.log_softmax(logits_TV, dim=-1).split(len(ids))
    divergence = (before_TV.exp() * (before_TV - after_TV)).sum(dim=-1).mean()
    targets_T1 = torch.tensor(ids[1:], device=base.device)[:, None]
    change = (after_TV - before_TV)[:-1].gather(1, targets_T1).mean().abs()
    return float(torch.maximum(divergence, change))


def _row(ids: list[int], slot: int, num_blocks: int) -> ScheduledRow:
    request = Request(
        id=f"int8-probe-{slot}",
        tenant="",
        prompt_ids=ids,
        params=SamplingParams(max_tokens=0, prompt_logprobs=0),
        adapter=AdapterDigest(f"int8 probe {slot}"),
        slot=slot,
        block_ids=list(range(slot * num_blocks, (slot + 1) * num_blocks)),
    )
    return ScheduledRow(request, 0, len(ids))

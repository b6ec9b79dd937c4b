"""The identity of an adapter version: sha256 over base, meaning and tensors. Knows no files and no names of tenants.

A tool dialect, a chat template and int8 are part of it; without them it is what it was before there were any.
Two uploads with the same digest compute the same thing: key order, neutral fields, file order, tensor names ("lora_A"
or "lora_A.default") and free metadata leave it as it is.
"""

from __future__ import annotations

import hashlib
import json

from adapters_store.base.description import AdapterDigest
from adapters_store.format.dtypes import Bits
from adapters_store.format.experts.plan import PlannedExperts
from adapters_store.format.validate import AdapterPlan

_DOMAIN = b"multilora adapter 1\n"


class DigestBuilder:
    """Feed it the tensors' bits module by module in the base's order, A before B before magnitudes, then those of the
    token layers, then those of experts part by part; then ask for the digest.

    The first bytes hashed fix every tensor's length, so no two adapters feed the same bytes.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        modules = [
            [
                module.name,
                module.rank,
                module.scale.hex(),
                module.a.dtype,
                module.a.shape,
                module.b.dtype,
                module.b.shape,
            ]
            for module in plan.modules
        ]
        chat = [plan.tool_dialect, plan.chat_template]
        whole: list[object] = [plan.base.digest, modules, *([] if chat == [None, None] else [chat])]
        if plan.alora_invocation_tokens is not None:
            whole.append({"alora_invocation_tokens": plan.alora_invocation_tokens})
        if plan.token_layers:
            parts = [
                [part.name, part.rank, part.scale.hex(), [[entry.dtype, entry.shape] for entry in part.entries]]
                for part in plan.token_layers
            ]
            whole.append({"token_layers": parts})
        if plan.has_magnitudes:
            whole.append(
                {"magnitudes": [None if part.magnitude is None else part.magnitude.dtype for part in plan.modules]}
            )
        if plan.experts:
            parts = [[stack.name, stack.rank, stack.scale.hex(), _parts_of(stack)] for stack in plan.experts]
            whole.append({"experts": parts})
        if plan.is_int8:
            whole.append({"adapter_dtype": "int8"})
        meaning = json.dumps(whole, separators=(",", ":"))
        self._hash = hashlib.sha256(_DOMAIN + meaning.encode() + b"\n")

    def update(self, bits: Bits) -> None:
        """Add the next tensor (contiguous, native little-endian)."""
        self._hash.update(bits.data.cast("B"))

    def digest(self) -> AdapterDigest:
        return AdapterDigest(f"sha256:{self._hash.hexdigest()}")


def _parts_of(stack: PlannedExperts) -> list[list[object]]:
    """For each pair of tensors: its expert, its first rank, and the types and shapes of both."""
    return [
        [part.expert, part.first_rank, part.a.dtype, part.a.shape, part.b.dtype, part.b.shape] for part in stack.parts
    ]

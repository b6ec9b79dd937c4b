"""Decides whether an adapter may be int8: by how much it changes what the adapter says. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters_store.errors import AdapterRejected
from adapters_store.format.validate import AdapterPlan
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.packing import pack

MAX_CHANGE_NATS = 0.01

Int8Change = Callable[[PackedAdapter, PackedAdapter], float]  # (in the base's dtype, in int8) -> nats per token


def check_int8(packed: PackedAdapter, plan: AdapterPlan, weights: Path, change: Int8Change | None) -> None:
    """Nothing for an adapter in the base's dtype.

    Raises AdapterRejected: int8_not_measured, int8_changes_too_much, and what `change` refuses."""
    if not packed.is_int8:
        return
    if change is None:
        message = "adapter_dtype: int8 is checked on the base in memory; upload it to the running server"
        raise AdapterRejected("int8_not_measured", message, param="adapter_dtype")
    nats = change(pack(replace(plan, is_int8=False), weights), packed)
    if not nats <= MAX_CHANGE_NATS:
        message = (
            f"adapter_dtype: int8 changes its log-probabilities by {nats:.2g} nats, the limit is {MAX_CHANGE_NATS}"
        )
        raise AdapterRejected("int8_changes_too_much", f"{message}; push it without", param="adapter_dtype")

"""What a resident process holds for runs: their base, and the proof that packing changes nothing on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from transformers.utils.logging import disable_progress_bar

from adapters_store.base.files import DTYPES, load_config
from adapters_store.base.nf4 import is_stored_in_nf4
from trainer.gate.general import own_examples
from trainer.model.attention import register_packed_attention
from trainer.model.held import CPU, HeldBase
from trainer.model.model import LossModel, Trainee
from trainer.model.packing_check import NUM_TOKENS, check_packing
from trainer.spec import TrainSpec


def is_held(spec: TrainSpec, held: HeldBase | None) -> bool:
    """Whether the run can begin with it; without a base held, whether it needs none."""
    if held is None:
        return not _can_share(spec)
    return _can_share(spec) and held.dtype is DTYPES[spec.precision] and held.is_of(spec.base)


def held_for(spec: TrainSpec) -> HeldBase | None:
    """The run's base, read now; None if the run needs weights of its own. Raises UnsupportedBase, OSError."""
    if not _can_share(spec) or is_stored_in_nf4(load_config(spec.base)):
        return None
    disable_progress_bar()
    held = HeldBase.read(spec.base, DTYPES[spec.precision])
    return replace(held, packing_difference=_in_fork(lambda: _packing_difference(held)))


def _can_share(spec: TrainSpec) -> bool:
    return spec.method in ("lora", "dora") and spec.sharding == "none" and spec.base.is_dir()


def _packing_difference(held: HeldBase) -> float:
    """On the project's own text. Raises what check_packing does, and DataRejected; each run then checks on its data."""
    held.causal.set_attn_implementation(register_packed_attention())
    trainee = Trainee(LossModel(held.causal), CPU, held.dtype)
    examples = own_examples(held.tokenizer, max_tokens=NUM_TOKENS, num_embeddings=held.causal.config.vocab_size)
    return check_packing(trainee, examples)


def _in_fork(work: Callable[[], float]) -> float | None:
    """What `work` returns in a fork; its changes to models end with the fork. None if it raises, or the fork dies."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    with suppress(ChildProcessError):  # a resident process leaves its children to the system
        os.waitpid(pid, 0)
    return float(text) if text else None

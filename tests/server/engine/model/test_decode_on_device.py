"""What a recorded decode step asks of the device: no answer, whatever the family, and the same launches every time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is to run here", allow_module_level=True)

from lora_kernels.lora.batch import LoraTable
from server.engine.model.base_model import load_base
from server.engine.model.kv_tensors import KVCache
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from support.kernels.triton_launches import recorded_launches
from support.models.models import FAMILY_NAMES, save_base

pytestmark = pytest.mark.usefixtures("weights_lie_as_on_a_gpu")

ANSWERS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "item")
LORA = {"shrink_kernel", "expand_kernel"}


class NoAnswers(TorchDispatchMode):
    """Fails if an operation's result must come back to the host before the next can be launched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in ANSWERS, f"{name} would make the host wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_recorded_step_never_waits_and_bare_rows_launch_no_adapter(family: str, tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path / family, family), dtype="bfloat16")
    table = LoraTable(torch.zeros(64, dtype=base.dtype), len(base.description.modules), 1)
    runner = ModelRunner(base, KVCache.allocate(base, num_blocks=4, block_size=8), table, sampler=None)  # type: ignore[arg-type]
    buffers = DecodeBuffers(table, max_rows=4, max_context=64, block_size=8)
    names: dict[int, list[str]] = {}
    with recorded_launches() as launches, torch.inference_mode():
        for max_rank in (0, 16):
            batch = buffers.step(4, max_rank)
            runner.forward(batch)
            del launches[:]
            with NoAnswers():
                runner.forward(batch)
            names[max_rank] = [launch.name for launch in launches]
    assert not LORA & set(names[0])
    layers = base.config.num_hidden_layers
    assert names[16].count("shrink_kernel") == names[16].count("expand_kernel") == len(base.description.groups)
    assert names[0].count("attention_kernel") == names[0].count("rotated_store_kernel") == layers
    assert names[0].count("add_rms_norm_kernel") == 2 * layers, "each residual sum is normed in the same launch"
    assert not {"rope_kernel", "store_kv_kernel"} & set(names[0]), "the store rotates"
    assert [name for name in names[16] if name not in LORA] == names[0]

"""What a recorded step reads lives as long as its recording: a CUDA graph keeps none of it, and a replay that reads
freed memory ends the context or gives another row's logits."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is to run here", allow_module_level=True)

from lora_kernels.lora.batch import LoraTable
from server.engine.model.base_model import load_base
from server.engine.model.kv_tensors import KVCache
from server.engine.model.recorded.cuda_graphs import DecodeGraphs, GraphSettings
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from support.kernels.triton_launches import recorded_launches
from support.kernels.watched_capture import WatchedCapture
from support.models.models import save_base

pytestmark = pytest.mark.usefixtures("weights_lie_as_on_a_gpu")


@pytest.fixture(params=["llama", "phi3-longrope"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> ModelRunner:
    base = load_base(save_base(tmp_path / "base", request.param, num_hidden_layers=1), dtype="bfloat16")
    table = LoraTable(torch.zeros(64, dtype=base.dtype), len(base.description.modules), 1)
    return ModelRunner(base, KVCache.allocate(base, num_blocks=4, block_size=8), table, sampler=None)  # type: ignore[arg-type]


def test_nothing_that_a_recording_reads_is_freed(runner: ModelRunner) -> None:
    buffers = DecodeBuffers(runner.table, max_rows=4, max_context=64, block_size=8)
    capture = WatchedCapture()
    graphs = DecodeGraphs(buffers, runner.forward, capture, GraphSettings(buckets=(1, 4), max_ranks=(0, 16, 256)))
    with recorded_launches():
        graphs.record_all()
    lora = runner.base.lora
    lora.layers = lora.head = None
    if runner.base.rope is not None:
        runner.base.rope.last_positions_1T = torch.zeros(1, 1)
    gc.collect()
    assert graphs.num_recorded == len(capture.recordings) == 6
    assert all(len(recording.read) > 12 for recording in capture.recordings), "weights, caches and inputs at least"
    assert [freed for recording in capture.recordings for freed in recording.freed] == []

"""On a GPU: every operation equals its reference, twice the same, and nothing is compiled anew for a new length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.bench import Bench
from lora_kernels.check_cases import lora_case, normal, random_table
from lora_kernels.lora.batch import LoraBatch, LoraGroup
from lora_kernels.lora.launcher import add_lora_delta
from lora_kernels.self_test import self_test

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GROUP = LoraGroup((0, 1, 2), 4096, (4096, 1024, 1024))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_self_test_passes(device: torch.device, dtype: torch.dtype) -> None:
    assert [check.text for check in self_test(device, dtype) if not check.is_ok] == []


def test_every_case_of_the_suite_is_right() -> None:
    rows = correctness.run(Bench.here(toy=False))
    assert [row for row in rows if not row["ok"]] == []


def test_split_sums_are_the_same_every_time(device: torch.device) -> None:
    batch = LoraBatch(random_table(GROUP, (16, 64), torch.bfloat16, device), np.array([0, 1, 0], dtype=np.int32))
    x = normal(3, 4096, dtype=torch.bfloat16, device=device)
    y = torch.zeros(3, 6144, dtype=torch.bfloat16, device=device)
    results = [add_lora_delta(y.clone(), x, batch, GROUP) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_new_number_of_rows_compiles_nothing(device: torch.device) -> None:
    from lora_kernels.lora.shrink_expand import shrink_kernel

    def variants() -> int:
        caches = shrink_kernel.device_caches  # type: ignore[attr-defined]
        return len(caches[torch.cuda.current_device()][0])

    for count in (1, 16, 17, 300):
        lora_case(GROUP, (16, 8), np.zeros(count, dtype=np.int32), dtype=torch.bfloat16, device=device)
    before = variants()
    for count in (2, 3, 5, 15, 31, 100, 257, 1000):
        lora_case(GROUP, (16, 8), np.arange(count, dtype=np.int32) % 2, dtype=torch.bfloat16, device=device)
    assert variants() == before

"""A mixed batch on SmolLM2 gets the logits and the answers that transformers and PEFT give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.base.nf4 import nf4_config
from adapters_store.base.tokenizer import load_tokenizer
from server.engine.model.base_model import load_base
from server.engine.startup.settings import MemoryBudget
from support.models.models import adapter_configs, peft_model, save_adapter
from support.models.packed_forward import PackedForward
from support.servers.service import running

TEXTS = ("The capital of France is", "Привет! Как", "def add(a, b):\n    return", "Why is the sky blue? Because")
SLOTS = (0, 1, None, 0)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    configs = adapter_configs(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    return [
        save_adapter(base, folder / kind, configs[kind], seed=seed, scale=0.02)
        for seed, kind in enumerate(("rank16", "rslora"))
    ]


def rows_of(base: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(base)
    return [tokenizer.encode(text) for text in TEXTS]


def oracle(base: Path, adapters: list[Path], dtype: torch.dtype, *, nf4: bool = False) -> list[torch.Tensor]:
    """PEFT's logits of each row with its one adapter."""
    found: dict[int, torch.Tensor] = {}
    rows, quantised = rows_of(base), nf4_config(dtype) if nf4 else None
    for slot in set(SLOTS):
        model = peft_model(base, None if slot is None else adapters[slot], dtype=dtype, nf4=quantised)
        with torch.inference_mode():
            found |= {i: model(torch.tensor([rows[i]])).logits[0].float() for i, s in enumerate(SLOTS) if s == slot}
    return [found[index] for index in range(len(rows))]


def ours(base: Path, adapters: list[Path], dtype: str, *, quantize: str | None = None) -> list[torch.Tensor]:
    forward = PackedForward(load_base(base, dtype=dtype, quantize=quantize), adapters, num_sequences=len(SLOTS))
    requests = [forward.request(i, row, slot) for i, (row, slot) in enumerate(zip(rows_of(base), SLOTS, strict=True))]
    return [got.float() for got in forward.logits(requests)]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return float(torch.cat([(a - b).flatten() for a, b in zip(found, exact, strict=True)]).pow(2).mean().sqrt())


def test_float32_logits_are_pefts(base: Path, adapters: list[Path]) -> None:
    exact = oracle(base, adapters, torch.float32)
    for got, expected in zip(ours(base, adapters, "float32"), exact, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bfloat16_and_nf4_err_no_more_than_pefts_own(base: Path, adapters: list[Path]) -> None:
    exact = oracle(base, adapters, torch.float32)
    assert error(ours(base, adapters, "bfloat16"), exact) <= 1.5 * error(oracle(base, adapters, torch.bfloat16), exact)
    exact = oracle(base, adapters, torch.float32, nf4=True)
    assert error(ours(base, adapters, "float32", quantize="nf4"), exact) <= 1e-3 * float(exact[0].abs().max())


def greedy_by_peft(base: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    """16 tokens in float32, none of them an end."""
    model: Any = peft_model(base, adapter)
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def test_the_engines_greedy_answers_are_transformers_and_pefts(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    memory = MemoryBudget(kv_cache=64 << 20, adapter_pool=32 << 20, host_cache=64 << 20)
    with running(base, {"rslora": adapters[1]}, tmp_path, memory=memory) as service:
        for adapter, question in ((None, "Who wrote Hamlet?"), ("rslora", "What is 2 + 2?")):
            ids = service.worker.tokenizer.encode_chat([{"role": "user", "content": question}])
            folder = adapters[1] if adapter else None
            assert service.tokens(ids, adapter, max_tokens=16) == greedy_by_peft(base, folder, ids)

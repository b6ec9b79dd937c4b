"""(e) The same shape through PEFT's mixed batch and transformers' `generate`: what users have otherwise."""

from __future__ import annotations

import importlib.util
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.random_base import llama_config
from benchmarks.gpu.sizes import sizes_for

NUM_ADAPTERS = 8
NEW_TOKENS = 16


def run(bench: Bench) -> list[Row]:
    """tok/s of `generate`, prefill included, base alone and with distinct adapters."""
    if importlib.util.find_spec("peft") is None:
        bench.say("peft is not installed: left out")
        return [{"kind": "peft", "left_out": "peft is not installed"}]
    from peft import LoraConfig, get_peft_model

    sizes = sizes_for(toy=bench.toy)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(llama_config(sizes.model), dtype=torch.bfloat16)
    count = 2 if bench.toy else NUM_ADAPTERS
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    with torch.device(bench.device):
        peft_model = get_peft_model(model.eval(), config, adapter_name="a0")
        for index in range(1, count):
            peft_model.add_adapter(f"a{index}", config)
    peft_model.eval()
    rows: list[Row] = []
    for num_rows in sizes.peft_rows:
        for adapters in (0, count):
            names = [f"a{index % count}" if adapters else "__base__" for index in range(num_rows)]
            prompt = torch.randint(2, sizes.model.vocab, (num_rows, sizes.prompt), device=bench.device)
            new = 4 if bench.toy else NEW_TOKENS
            seconds = min(_generate(bench, peft_model, prompt, names, new) for _ in range(2))
            row: Row = {"kind": "peft", "rows": num_rows, "adapters": adapters, "tok_per_s": num_rows * new / seconds}
            rows.append(row | {"ms_per_token": 1e3 * seconds / new})
    return rows


@torch.inference_mode()
def _generate(bench: Bench, model: torch.nn.Module, prompt: torch.Tensor, names: list[str], new: int) -> float:
    bench.synchronize()
    began_s = time.perf_counter()
    model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        adapter_names=names,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    bench.synchronize()
    return time.perf_counter() - began_s

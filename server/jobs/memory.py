"""Whether a training fits beside what runs: a conservative estimate against what is free. Allocates nothing.

The estimate is a seam: `Estimate` is any function from a spec to bytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.host_memory import free_host_bytes
from trainer.spec import TrainSpec

Estimate = Callable[[TrainSpec], int]

MIB = 1024 * 1024
PROCESS_BYTES = 768 * MIB  # Python, torch and the tokenizer, before the first weight
DISK_BYTES = 256 * MIB  # logs, events and the first checkpoints
_ADAMW_BYTES = 16  # weight, gradient and two moments in float32
_ACTIVATIONS = 24  # values kept per token, layer and hidden unit without checkpointing, a gated MLP included
_QUANTIZED_SHARE = 0.3  # NF4 with its constants, against two bytes a weight


def estimated_bytes(spec: TrainSpec) -> int:
    """Weights, adapter with its optimizer, activations and logits of one forward, and the process. Errs high."""
    config: dict[str, Any] = json.loads((spec.base / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    width, vocabulary = int(config.get("intermediate_size", 4 * hidden)), int(config["vocab_size"])
    two_bytes = sum(file.stat().st_size for file in spec.base.glob("*.safetensors"))
    if spec.method == "qlora":
        weights = int(two_bytes * _QUANTIZED_SHARE)
    else:
        weights = two_bytes * (2 if spec.precision == "float32" else 1)
    trained = two_bytes // 2 if spec.method == "full" else spec.adapter.rank * layers * (11 * hidden + 3 * width)
    value = 4 if spec.precision == "float32" else 2
    tokens = spec.batch.forward_tokens
    kept = 2 if spec.checkpointing else _ACTIVATIONS
    activations = tokens * layers * (kept * hidden + (0 if spec.checkpointing else 3 * width)) * value
    logits = min(tokens, 1024) * vocabulary * 4 * 3
    return weights + trained * _ADAMW_BYTES + activations + logits + PROCESS_BYTES


def advice(spec: TrainSpec, available_bytes: int) -> list[str]:
    """What to change so that the training fits; empty where the planner does not know the base, or sees no need.

    The planner reads the base through transformers: seconds that only a refusal is worth.
    """
    from trainer.planner.advice import advise
    from trainer.planner.shapes import PlanError

    try:
        return advise(spec, available_bytes)
    except PlanError:
        return []


def free_bytes(device: str = "cpu") -> int | None:
    """What a training may take now; None where the system does not say."""
    if device != "cuda":
        return free_host_bytes()
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return max((int(line) * MIB for line in told), default=None)


def free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free

"""Examples, batches and specs for the trainer's tests, on the tiny bases of `support.models.models`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from server.demo.assets import demo_base_path
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style
from support.models.models import VOCAB
from support.servers.waiting import wait_until
from trainer.data.packing import pack
from trainer.data.types import EncodedExample, PackedBatch
from trainer.run_folder.events import EventReader
from trainer.spec import TrainSpec

STEPS = 24


def random_examples(count: int, *, seed: int = 0, low: int = 4, high: int = 24) -> list[EncodedExample]:
    """Random tokens; roughly the second half of each is learned."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(low, high))
        weights = (np.arange(length) >= max(length // 2, 1)).astype(np.float32)
        examples.append(EncodedExample(rng.integers(3, VOCAB, length).astype(np.int32), weights, bytes([index % 256])))
    return examples


def random_batch(count: int, *, seed: int = 0) -> PackedBatch:
    return pack(random_examples(count, seed=seed))


def tiny_spec(base: Path, **changes: Any) -> TrainSpec:
    """A LoRA run on `base`; nested changes as in YAML."""
    body: dict[str, Any] = {"base": base, "data": "unused.jsonl", "adapter": {"rank": 4}}
    return TrainSpec.from_mapping({**body, **changes})


def gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten().float() for parameter in parameters if parameter.grad is not None])


def write_chats(path: Path, count: int = 48, *, tenant: Style = "law") -> Path:
    """A tenant's dialogues as a JSONL file of chats."""
    path.write_text(chat_lines(tenant, count))
    return path


@cache
def chat_lines(tenant: Style, count: int) -> str:
    lines = []
    for dialogue in tenant_dialogues(tenant, count):
        turns = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
        for turn in dialogue.turns:
            turns.append({"role": "user", "content": turn.prompt})
            turns.append({"role": "assistant", "content": turn.answer})
        lines.append(json.dumps({"messages": turns}) + "\n")
    return "".join(lines)


def base_with_a_wider_tokenizer(folder: Path) -> Path:
    """The demo's base whose tokenizer got a token "[PAD]" that the model has no embedding row for."""
    shutil.copytree(demo_base_path(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.add_tokens(["[PAD]"]) == 1
    tokenizer.save_pretrained(folder)
    return folder


def demo_spec(folder: Path, **changes: Any) -> TrainSpec:
    """A short LoRA run on the demo's base and a file of chats in `folder`; nested changes as in YAML."""
    data = folder / "data.jsonl"
    if not data.exists():
        write_chats(data)
    body: dict[str, Any] = {
        "base": demo_base_path(),
        "data": data,
        "adapter": {"rank": 4},
        "optim": {"learning_rate": 5e-3, "max_steps": STEPS},
        "batch": {"examples": 4, "max_sequence_length": 256},
        "eval_every": 9,
    }
    return TrainSpec.from_mapping({**body, **changes})


def trained_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The trained parameters of one checkpoint."""
    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")


def trainer_process(spec: TrainSpec, run_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    """`python -m trainer`, started and not waited for."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(spec.to_yaml())
    command = [sys.executable, "-m", "trainer", str(path), "--run-dir", str(run_dir), *options]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait_for_step(run_dir: Path, step: int, *, timeout_s: float = 600) -> None:
    """Until the run has written this step's event."""
    reader = EventReader(run_dir)
    wait_until(
        lambda: any(event["type"] == "step" and event["step"] >= step for event in reader.new_events()),
        timeout_s=timeout_s,
    )

"""The memory that a training is let in with, against the most that its process ever held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters_store.base.tokenizer import load_tokenizer
from server.jobs.steps.memory import estimated_bytes
from support.trainers.training import trainer_process
from trainer.run_folder.folder import RunFolder
from trainer.spec import TrainSpec

TOKENS = 2048


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_estimate_is_what_full_forwards_take(base: Path, tmp_path: Path, precision: str) -> None:
    """Eight examples of a quarter of a forward each: two forwards make the step, and both are full."""
    tokenizer = load_tokenizer(base)
    words = [text for text in (tokenizer.decode([token]) for token in range(3000, 30000)) if text.isascii()]
    texts = [" ".join(words[number * 600 : (number + 1) * 600]) for number in range(26)]
    cut = [tokenizer.decode(tokenizer.encode(text)[: TOKENS // 4 - 4]) for text in texts]
    for name, part in (("data", cut[:16]), ("validation", [text[:200] for text in cut[16:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    spec = TrainSpec.from_mapping(
        {
            "base": base,
            "precision": precision,
            "data": tmp_path / "data.jsonl",
            "validation": tmp_path / "validation.jsonl",
            "batch": {"examples": 8, "max_sequence_length": TOKENS},
            "optim": {"max_steps": 1},
        }
    )
    assert trainer_process(spec, tmp_path / "run").wait(3600) == 0
    peak, planned = RunFolder(tmp_path / "run").result()["peak_bytes"], estimated_bytes(spec)
    print(f"{planned >> 20} MiB planned, {peak >> 20} MiB at most, {planned / peak:.2f}")
    assert 0.95 <= planned / peak <= 1.15

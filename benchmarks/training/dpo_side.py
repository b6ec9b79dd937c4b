"""One side of `dpo_vs_trl`, in a process of its own: trains some steps on preference pairs and prints one JSON object.

Both sides get the same pairs in the same steps, the same first adapter (rank 16 on every linear layer, drawn from the
spec's seed), rate, schedule, beta and clipping, and no gradient checkpointing; the reference is the base without it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters_store.base.tokenizer import load_tokenizer
from benchmarks.training.side import (
    WARM_UP,
    SideResult,
    followed_steps,
    from_command_line,
    spec_of,
    train_ours,
    trl_arguments,
    trl_result,
)
from trainer.data.dataset import batches_of
from trainer.data.encode import Encoder, encode_all
from trainer.data.jsonl import read_jsonl
from trainer.data.types import EncodedExample
from trainer.model.model import load
from trainer.spec import TrainSpec

SIDES = ("ours", "trl")
PAIRS_PER_STEP = 8
BETA = 0.1
Pairs = list[dict[str, str]]


def random_pairs(count: int, tokenizer: Any) -> Pairs:
    """Prompts and answers of random words, log-normal lengths, median 25 and at most 128 words each."""
    rng = np.random.default_rng(0)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalnum())  # its order varies

    def text() -> str:
        length = int(np.clip(rng.lognormal(3.2, 0.6), 4, 128))
        return " ".join(rng.choice(words, length))

    return [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(count)]


def encoded(spec: TrainSpec, pairs: Pairs, scratch: Path) -> list[EncodedExample]:
    """As the trainer reads them from a file."""
    path = scratch / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    encoder = Encoder(load_tokenizer(spec.base), max_sequence_length=spec.batch.max_sequence_length)
    return list(encode_all(read_jsonl(path).records(), encoder))


def train_trl(spec: TrainSpec, pairs: Pairs, examples: list[EncodedExample], scratch: Path) -> SideResult:
    """TRL's DPOTrainer on padded batches, from the same first adapter."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    batches = batches_of(spec, examples)
    order = [index for step in batches.epoch_steps(0) for index in step]
    followed, times = followed_steps()
    peft: Any = load(spec, torch.device("cpu")).peft
    peft.get_base_model().set_attn_implementation("sdpa")
    config = DPOConfig(**trl_arguments(spec, scratch, PAIRS_PER_STEP), beta=BETA)
    data = Dataset.from_list([pairs[index] for index in order])
    trainer = DPOTrainer(
        model=peft,
        args=config,
        train_dataset=data,
        processing_class=load_tokenizer(spec.base),
        callbacks=[followed],
    )
    trainer.train()
    return trl_result(trainer, [examples[index] for index in order[WARM_UP * PAIRS_PER_STEP :]], times)


def main() -> None:
    given = from_command_line(__doc__, SIDES)
    spec = spec_of(given, PAIRS_PER_STEP, optim={"learning_rate": 1e-4}, method="dpo", dpo={"beta": BETA})
    pairs = random_pairs(given.steps * PAIRS_PER_STEP, load_tokenizer(spec.base))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        examples = encoded(spec, pairs, scratch)
        if given.side == "ours":
            result = train_ours(spec, examples, scratch)
        else:
            result = train_trl(spec, pairs, examples, scratch)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

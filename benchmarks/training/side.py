"""One side of `train_vs_trl`, in a process of its own: trains some steps and prints one JSON object. Decides no claim.

Both sides get the same examples in the same steps, the same adapter (rank 16 on every linear layer), learning rate,
schedule and clipping; what differs is how a step is computed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters_store.base.files import load_config
from benchmarks.common.shapes import base_folder, shape_for
from trainer.data.dataset import batches_of
from trainer.data.packing import pack
from trainer.data.types import EncodedExample
from trainer.loop import Loop
from trainer.model.memory import peak_bytes
from trainer.model.model import load
from trainer.model.ranks import Ranks
from trainer.optim import make_optimizer
from trainer.run_folder.checkpoint import Checkpoints
from trainer.run_folder.control import Control
from trainer.run_folder.events import RunLog, read_events
from trainer.run_folder.folder import RunFolder
from trainer.spec import TrainSpec

SIDES = ("ours", "trl", "trl-chunked")
EXAMPLES_PER_STEP = 16
WARM_UP = 2  # steps that are not counted


@dataclass(frozen=True, slots=True)
class SideResult:
    """tokens_per_s: of real tokens, padding not counted, over the steps after the warm-up. losses: of every step."""

    tokens_per_s: float
    peak_bytes: int
    losses: list[float]


def short_examples(count: int, vocab: int) -> list[EncodedExample]:
    """Lengths like those of chats: log-normal, median 55, from 12 to 256 tokens; the second half is learned."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 0.6, count), 12, 256).astype(int)
    return [
        EncodedExample(
            rng.integers(2, vocab, length).astype(np.int32), (np.arange(length) >= length // 2).astype(np.float32)
        )
        for length in lengths
    ]


def spec_of(given: argparse.Namespace, examples: int, *, optim: Mapping[str, Any] = {}, **more: Any) -> TrainSpec:
    """given: the command line. examples: of a step. optim, more: what a method has beside."""
    return TrainSpec.from_mapping(
        {
            "base": given.base,
            "data": "none",
            "precision": given.precision,
            "optim": {"max_steps": given.steps, "warmup_fraction": 0, "schedule": "linear", **optim},
            "batch": {"examples": examples, "max_sequence_length": 2048},
            "eval_every": given.steps,
            **more,
        }
    )


def train_ours(spec: TrainSpec, examples: list[EncodedExample], scratch: Path) -> SideResult:
    """Our own loop; every step's event is a reading of the clock."""
    torch.manual_seed(spec.seed)
    ranks = Ranks(0, 1, torch.device("cpu"))
    trainee = load(spec, ranks.device)
    held_out = [pack([EncodedExample(np.array([2, 3], dtype=np.int32), np.array([0, 1], dtype=np.float32))])]
    optimizer = make_optimizer(trainee.trained(), spec.optim)
    folder = RunFolder(scratch)
    checkpoints = Checkpoints(folder, ranks, lambda weights, folder: None)
    log = RunLog(folder)
    batches = batches_of(spec, examples)
    Loop(spec, trainee, optimizer, batches, held_out, ranks, checkpoints, Control(folder), log).run()
    steps = [event for event in read_events(scratch) if event["type"] == "step"]
    seconds = steps[-1]["time"] - steps[WARM_UP - 1]["time"]
    tokens = steps[-1]["tokens"] - steps[WARM_UP - 1]["tokens"]
    return SideResult(tokens / seconds, peak_bytes(torch.device("cpu")), [step["loss"] for step in steps])


def followed_steps() -> tuple[Any, list[float]]:
    """A callback for transformers' Trainer, and the list of times that it fills: one for each step's end."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            times.append(time.time())

    return Clock(), times


def train_trl(spec: TrainSpec, examples: list[EncodedExample], scratch: Path, *, chunked: bool) -> SideResult:
    """TRL's SFTTrainer, padded batches; it packs exactly only on FlashAttention, which a CPU does not have."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    assert spec.optim.max_steps is not None
    batches = batches_of(spec, examples)
    rows = [examples[index] for step in batches.epoch_steps(0) for index in step]
    data = Dataset.from_list(
        [{"input_ids": row.input_ids.tolist(), "completion_mask": row.supervised.astype(int).tolist()} for row in rows]
    )
    followed, times = followed_steps()
    config = SFTConfig(
        **trl_arguments(spec, scratch, EXAMPLES_PER_STEP),
        completion_only_loss=True,
        loss_type="chunked_nll" if chunked else "nll",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec.base, dtype=getattr(torch, spec.precision)),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(spec.base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[followed],
    )
    trainer.train()
    return trl_result(trainer, rows[WARM_UP * EXAMPLES_PER_STEP : spec.optim.max_steps * EXAMPLES_PER_STEP], times)


def trl_arguments(spec: TrainSpec, scratch: Path, rows_per_step: int) -> dict[str, Any]:
    """What every trainer of TRL is given, so that it takes our steps in our order and nothing else."""
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": rows_per_step,
        "train_sampling_strategy": "sequential",
        "max_steps": spec.optim.max_steps,
        "learning_rate": spec.optim.learning_rate,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "bf16": spec.precision == "bfloat16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }


def trl_result(trainer: Any, counted: list[EncodedExample], times: list[float]) -> SideResult:
    """Of a trainer that has trained. counted: its rows after the warm-up. times: when its steps ended, in seconds."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return SideResult(
        sum(map(len, counted)) / (times[-1] - times[WARM_UP - 1]), peak_bytes(torch.device("cpu")), losses
    )


def from_command_line(about: str | None, sides: Sequence[str]) -> argparse.Namespace:
    """What either side of a comparison is given."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("side", choices=sides)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--base", type=Path, default=None, help="a base's folder, in place of random weights")
    given = parser.parse_args()
    given.base = given.base or base_folder(shape_for(quick=given.quick))
    return given


def main() -> None:
    given = from_command_line(__doc__, SIDES)
    spec = spec_of(given, EXAMPLES_PER_STEP)
    examples = short_examples(given.steps * EXAMPLES_PER_STEP, load_config(spec.base).vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        if given.side == "ours":
            result = train_ours(spec, examples, Path(scratch))
        else:
            result = train_trl(spec, examples, Path(scratch), chunked=given.side == "trl-chunked")
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

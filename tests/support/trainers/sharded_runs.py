"""Trains several specs one after another on the ranks that torchrun started: one start for many comparisons."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from trainer.run import train
from trainer.spec import TrainSpec

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for folder in sys.argv[1:]:
        train(TrainSpec.from_yaml(Path(folder) / "spec.yaml"), Path(folder) / "run")
    dist.destroy_process_group()

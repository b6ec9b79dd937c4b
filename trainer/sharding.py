"""Loads each rank's share of the model. Placeholder until below is written."""

from __future__ import annotations

from trainer.model import Trainee
from trainer.ranks import Ranks
from trainer.spec import TrainSpec


def load_sharded(spec: TrainSpec, ranks: Ranks) -> Trainee:
    raise NotImplementedError

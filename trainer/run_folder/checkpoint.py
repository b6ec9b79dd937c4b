"""Checkpoints of a run, each whole or absent. Decides what they hold and which are kept.

checkpoints/step-000123/ is written aside, synced, renamed:
    weights.safetensors     the trained parameters as they are (float32), by the model's own names
    optimizer.safetensors   AdamW's state, "<parameter>|<key>"
    progress.json           step, data cursor, losses; the learning rate and the random numbers are functions of these
    adapter_config.json, adapter_model.safetensors     the same adapter in PEFT's format (not for "full")
Under sharding every tensor is whole: a run may resume with another number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.model.model import Trainee
from trainer.model.ranks import Ranks
from trainer.run_folder.folder import RunFolder
from trainer.run_folder.progress import Progress

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"
Export = Callable[[dict[str, Tensor], Path], None]  # the trained parameters -> more files in the checkpoint's folder
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder. Only the first rank writes; every rank gathers its shards for it."""

    folder: RunFolder
    ranks: Ranks
    export: Export
    keep_best: int = 2
    keep_last: int = 1

    def save(self, trainee: Trainee, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write one, drop those that need not be kept. Raises OSError; a full disk leaves the older ones whole."""
        weights = {name: whole(weight) for name, weight in trainee.named_trained()}
        state = optimizer_tensors(trainee, optimizer)
        target = self.folder.checkpoint(progress.step)
        if self.ranks.is_first and not target.exists():
            with self.folder.files.new_folder(target) as aside:
                save_file(weights, aside / WEIGHTS)
                save_file(state, aside / OPTIMIZER)
                self.folder.files.write(aside / PROGRESS, json.dumps(asdict(progress)).encode())
                self.export(weights, aside)
            self._prune(progress)
        self.ranks.wait()
        return target

    def _prune(self, progress: Progress) -> None:
        steps = self.folder.checkpoint_steps()
        kept = {*steps[-self.keep_last :], *progress.best_steps(self.keep_best)}
        for step in steps:
            if step not in kept:
                checkpoint, files = self.folder.checkpoint(step), self.folder.files
                trash = checkpoint.with_name(f".{checkpoint.name}.trash")
                files.rename(checkpoint, trash)  # first: half a checkpoint is never found under its name
                files.remove_tree(trash)

    def clean(self) -> None:
        """Remove what a killed process left behind."""
        if self.ranks.is_first and self.folder.checkpoints.is_dir():
            for path in self.folder.checkpoints.glob(".*"):
                self.folder.files.remove_tree(path)

    def restore(self, step: int, trainee: Trainee, optimizer: torch.optim.Optimizer) -> Progress:
        """Put weights and optimizer back as they were; returns the progress so far."""
        folder = self.folder.checkpoint(step)
        load_weights(trainee, folder / WEIGHTS)
        _load_optimizer(trainee, optimizer, folder / OPTIMIZER)
        return Progress.from_mapping(json.loads((folder / PROGRESS).read_text()))


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, gathered if it is sharded (every rank must ask)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """`tensor`, which every rank holds whole, laid out as `weight` is: same device, same shards."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
    return tensor


def optimizer_tensors(trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, whole, by parameter name; without the tables of 8-bit moments, which never change."""
    tensors = {}
    for name, weight in trainee.named_trained():
        for key, value in optimizer.state[weight].items():
            if key not in _TABLES:
                tensors[f"{name}|{key}"] = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_weights(trainee: Trainee, path: Path) -> None:
    """Every trained parameter from a checkpoint's weights.safetensors; a missing one is an error."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, weight in trainee.named_trained():
            weight.copy_(like(file.get_tensor(name), weight))


def _load_optimizer(trainee: Trainee, optimizer: torch.optim.Optimizer, path: Path) -> None:
    by_weight: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            name, _, field = key.rpartition("|")
            by_weight.setdefault(name, {})[field] = file.get_tensor(key)
    for name, weight in trainee.named_trained():
        state = _state_like(by_weight.get(name, {}), weight)
        tables = getattr(optimizer, "name2qmap", None)  # bitsandbytes' own
        optimizer.state[weight] = state if tables is None or not state else _eight_bit(state, tables, weight)


def _eight_bit(state: dict[str, Tensor], tables: Mapping[str, Tensor], weight: Tensor) -> dict[str, Any]:
    """A state as bitsandbytes has it: the step as a number, and its tables for weights that are not too small."""
    found: dict[str, Any] = {**state, "step": int(state["step"])}
    if state["state1"].dtype == torch.uint8:
        found |= {key: tables[name].to(weight.device) for key, name in _TABLES.items()}
    return found


def _state_like(state: Mapping[str, Tensor], weight: nn.Parameter) -> dict[str, Tensor]:
    return {
        key: like(value, weight) if value.shape == weight.shape else value.to(weight.device)
        for key, value in state.items()
    }

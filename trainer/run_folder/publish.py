"""What a finished run leaves: the adapter's (or the whole model's) final folder, and what made it. Knows files."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters_store.base.converted.shards import copy_companions
from adapters_store.base.files import DTYPES, load_config, served_dtype
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from trainer.model.adapter import adapter_tensors, write_adapter
from trainer.model.model import Trainee
from trainer.run_folder.checkpoint import WEIGHTS, Export
from trainer.run_folder.folder import RunFolder
from trainer.spec import TrainSpec

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
PACKAGES = ("multilora", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")


def exporter(trainee: Trainee, spec: TrainSpec, base_digest: str) -> Export:
    """Adds PEFT's two files to a checkpoint; nothing for "full", whose weights are their own checkpoint."""
    peft = trainee.peft

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        if peft is not None:
            state = {name.removeprefix("net."): weight for name, weight in weights.items()}
            tensors = adapter_tensors(peft, state)
            write_adapter(peft, tensors, folder, spec=spec, base_digest=base_digest)

    return export


def publish(trainee: Trainee, spec: TrainSpec, checkpoint: Path, folder: RunFolder) -> Path:
    """Make the checkpoint the run's output: its adapter, or for "full" a whole model. Returns that folder."""
    output = folder.output(spec.method)
    with folder.files.new_folder(output) as aside:
        if spec.method == "full":
            _write_model(trainee, spec, checkpoint, aside)
        else:
            for name in ADAPTER_FILES:
                folder.files.copy(checkpoint / name, aside / name)
        folder.files.remove_tree(output)  # of a start that died before it wrote its result
    return output


def _write_model(trainee: Trainee, spec: TrainSpec, checkpoint: Path, aside: Path) -> None:
    """A base folder as transformers writes it, in the type in which the old base is served."""
    dtype = served_dtype(load_config(spec.base), "auto")
    assert dtype in DTYPES.values(), f"a base in {dtype}"
    weights = load_file(checkpoint / WEIGHTS)
    state = {name.removeprefix("net."): weight.to(dtype) for name, weight in weights.items()}
    causal: Any = trainee.module.causal
    causal.config.dtype = dtype
    causal.save_pretrained(aside, state_dict=state)
    copy_companions(spec.base, aside)


def versions() -> dict[str, str]:
    """What made the adapter: packages, Python, and the device's kind."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "cuda": torch.version.cuda or "none"}

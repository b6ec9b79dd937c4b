"""What a finished run leaves: the adapter's (or the whole model's) final folder, and what made it. Knows files."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters_store.base.files import DTYPES, load_config, served_dtype
from adapters_store.storage.filesystem import Filesystem
from trainer.model.adapter import adapter_tensors, write_adapter
from trainer.model.model import Trainee
from trainer.run_folder.checkpoint import WEIGHTS, Export
from trainer.spec import TrainSpec

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PACKAGES = ("multilora", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")
# Of a base's folder: all that is neither weights nor remade by save_pretrained.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "generation_config.json",
)


def exporter(trainee: Trainee, spec: TrainSpec, base_digest: str) -> Export:
    """Adds PEFT's two files to a checkpoint; nothing for "full", whose weights are their own checkpoint."""
    peft = trainee.peft

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        if peft is not None:
            state = {name.removeprefix("net."): weight for name, weight in weights.items()}
            tensors = adapter_tensors(peft, state)
            write_adapter(peft, tensors, folder, base=spec.base.resolve().name, base_digest=base_digest)

    return export


def publish(trainee: Trainee, spec: TrainSpec, checkpoint: Path, run_dir: Path, files: Filesystem) -> Path:
    """The checkpoint's adapter/ or model/, written aside, synced and renamed. Returns the folder."""
    if spec.method == "full":
        return _placed(run_dir / MODEL_FOLDER, lambda aside: _write_model(trainee, spec, checkpoint, aside), files)
    return _placed(run_dir / ADAPTER_FOLDER, lambda aside: _copy_adapter(checkpoint, aside, files), files)


def _placed(target: Path, write: Callable[[Path], None], files: Filesystem) -> Path:
    aside = target.with_name(f".{target.name}.aside")
    files.remove_tree(aside)
    files.make_folder(aside)
    write(aside)
    for path in aside.iterdir():
        files.sync_file(path)
    files.sync_folder(aside)
    files.remove_tree(target)
    files.rename(aside, target)
    files.sync_folder(target.parent)
    return target


def _copy_adapter(checkpoint: Path, aside: Path, files: Filesystem) -> None:
    for name in ADAPTER_FILES:
        files.copy(checkpoint / name, aside / name)


def _write_model(trainee: Trainee, spec: TrainSpec, checkpoint: Path, aside: Path) -> None:
    """A base folder as transformers writes it, in the type in which the old base is served."""
    dtype = served_dtype(load_config(spec.base), "auto")
    assert dtype in DTYPES.values(), f"a base in {dtype}"
    weights = load_file(checkpoint / WEIGHTS)
    state = {name.removeprefix("net."): weight.to(dtype) for name, weight in weights.items()}
    causal: Any = trainee.module.causal
    causal.config.dtype = dtype
    causal.save_pretrained(aside, state_dict=state)
    for pattern in COMPANIONS:
        for path in spec.base.glob(pattern):
            shutil.copyfile(path, aside / path.name)


def versions() -> dict[str, str]:
    """What made the adapter: packages, Python, and the device's kind."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "cuda": torch.version.cuda or "none"}

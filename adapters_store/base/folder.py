"""What a base's folder holds: its config, its weight files, and why some folders are no base. Reads names, JSON and the
first bytes of files; imports no torch and no transformers. Nothing that a folder brings is ever run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import UserError
from adapters_store.parsing.adapter_files import CONFIG_FILE, LFS_POINTER, MLX_LM_KEYS

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_POINTER_BYTES = 1024  # a pointer has three short lines
_MAX_REASON = 400  # characters of another library's message
_READ_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
_CONVERT = "load it once with transformers and write it with `save_pretrained`, which makes safetensors"
_OTHER_FORMATS = (  # files, what they hold, the way out; the first that fits is named
    ("*.gguf", "GGUF weights, a format of llama.cpp", "give that file itself as the base"),
    ("consolidated*", "weights in their maker's own format", "take the repository in the format of transformers"),
    ("pytorch_model*.bin*", "pickled weights, and unpickling can run code", _CONVERT),
    ("*.pt", "pickled weights, and unpickling can run code", _CONVERT),
    ("*.pth", "pickled weights, and unpickling can run code", _CONVERT),
    ("*.h5", "TensorFlow's weights", "take the repository with safetensors"),
    ("*.msgpack", "Flax's weights", "take the repository with safetensors"),
    ("*.onnx", "an ONNX model", "take the repository that it was made from"),
)


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Any error of another library about the folder's files, as UnsupportedBase. what: the part that is read.

    The system's OSErrors, lack of memory and device errors stay as they are.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and jinja2 have no class in common
        if getattr(error, "errno", None) is not None or _is_of_the_machine(error):
            raise
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise UnsupportedBase(f"--base {folder}: {what} cannot be read: {reason}") from error


def _is_of_the_machine(error: Exception) -> bool:
    """torch's own classes are about devices and memory; its plain RuntimeErrors differ only by their text."""
    return type(error).__module__.startswith("torch") or (isinstance(error, RuntimeError) and "memory" in str(error))


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, as it is. Raises UnsupportedBase for a folder that is no base, or not a base alone."""
    _refuse_adapters(folder)
    if not (folder / CONFIG).is_file():
        raise UnsupportedBase(f"--base {folder}: no {CONFIG} there{_instead(folder)}")
    body = read_json(folder / CONFIG)
    _refuse_mlx(folder, body)
    return body


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises UnsupportedBase for a Git LFS pointer and for anything else."""
    _refuse_pointer(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedBase(f"--base {path.parent}: {path.name} is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise UnsupportedBase(f"--base {path.parent}: {path.name} must hold an object, got {str(body)[:40]!r}")
    return body


def refuse_pointers(folder: Path) -> None:
    """Raises UnsupportedBase if a file that is read is only Git LFS's pointer to its content."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_SUFFIXES and path.is_file():
            _refuse_pointer(path)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the base's tensors: model.safetensors, else those that its index names, in order of names.

    Raises UnsupportedBase if there are none, some are missing, or the index leads out of the folder.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    shards = [path.name for path in folder.glob("shard-*-model-*-of-*.safetensors")]
    if shards:
        reason = f"a checkpoint in shards of torch.distributed ({min(shards)}); write it with `save_pretrained`"
        raise UnsupportedBase(f"--base {folder}: {reason}")
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _named_by(index)
    lone = sorted(folder.glob("model-*-of-*.safetensors"))
    if lone:
        reason = f"weights in parts ({lone[0].name}), but no {INDEX}, which lists the file of each tensor; download it"
        raise UnsupportedBase(f"--base {folder}: {reason}")
    raise UnsupportedBase(f"--base {folder}: no *.safetensors there that transformers reads{_instead(folder)}")


def _named_by(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise UnsupportedBase(f"--base {index.parent}: {index.name} has no weight_map of tensors to files")
    files = sorted(set(names.values()))
    odd = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
    if odd:
        reason = f"{index.name} names {odd[0]!r}; only *.safetensors of the same folder are read"
        raise UnsupportedBase(f"--base {index.parent}: {reason}")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        reason = f"{len(missing)} of {len(files)} weight files are missing, the first is {missing[0]}; "
        raise UnsupportedBase(f"--base {index.parent}: {reason}the download is incomplete; `hf download` resumes it")
    return [index.parent / name for name in files]


def _refuse_pointer(path: Path) -> None:
    if path.stat().st_size > _POINTER_BYTES:
        return
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            reason = f"{path.name} is a Git LFS pointer, not the file itself; run `git lfs pull` in the folder"
            raise UnsupportedBase(f"--base {path.parent}: {reason}")


def _refuse_adapters(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        return
    kind, base = _adapter_of(folder)
    push = "push it with `multilora adapter push`" if kind == "a PEFT adapter" else "it cannot be pushed as it is"
    if (folder / CONFIG).is_file():
        reason = (
            f"holds {kind} ({CONFIG_FILE}) beside the base, which every tenant would get; move it to a folder "
            f"of its own; {push}"
        )
    else:
        reason = f"is {kind}, not a base; serve {base} and {push}"
    raise UnsupportedBase(f"--base {folder}: {reason}")


def _adapter_of(folder: Path) -> tuple[str, str]:
    """What kind of adapter, and the base it was made for."""
    body = read_json(folder / CONFIG_FILE)
    is_mlx = "peft_type" not in body and not MLX_LM_KEYS.isdisjoint(body)
    base = body.get("model" if is_mlx else "base_model_name_or_path")
    kind = "an MLX-LM adapter" if is_mlx else "a PEFT adapter" if "peft_type" in body else "an adapter"
    return kind, f"the base it was made for ({base[:200]})" if isinstance(base, str) else "its base"


def _refuse_mlx(folder: Path, body: dict[str, Any]) -> None:
    """MLX-LM writes its form as `quantization`, and again as a `quantization_config` without a method."""
    stored = body.get("quantization")
    if isinstance(stored, dict) and "bits" in stored:
        reason = f"weights quantised by MLX-LM ({stored['bits']!r:.10} bits), which only MLX reads; "
        raise UnsupportedBase(f"--base {folder}: {reason}take the repository that they were converted from")


def _instead(folder: Path) -> str:
    """What a folder that is no base holds, and the way out."""
    return next(_guesses(folder), "; a local folder of a transformers model is needed")


def _guesses(folder: Path) -> Iterator[str]:
    for pattern, kind, way_out in _OTHER_FORMATS:
        found = min((path.name for path in folder.glob(pattern)), default=None)
        if found is not None:
            yield f"; {found} holds {kind}: {way_out}"
    inner = sorted(folder.glob(f"snapshots/*/{CONFIG}")) or sorted(folder.glob(f"*/{CONFIG}"))
    if inner:
        yield f"; did you mean {inner[0].parent}?"

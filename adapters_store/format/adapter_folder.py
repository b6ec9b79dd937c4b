"""Reads an adapter's two files as a plan; if a folder does not have them, says what it is and the way out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from adapters_store.base.description import BaseDescription
from adapters_store.errors import AdapterRejected
from adapters_store.format.config import parse_config
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import read_header
from adapters_store.format.validate import AdapterPlan, plan_adapter
from adapters_store.parsing.adapter_files import (
    BIN_FILE,
    CONFIG_FILE,
    HEAD_BYTES,
    SHARDS_ADVICE,
    WEIGHTS_FILE,
    refuse_foreign_keys,
    refuse_lfs_pointer,
)

MAX_JSON_BYTES = 64 * 1024 * 1024  # a tokenizer.json of 250,000 tokens has 33
MAX_SHOWN = 3

_SHARDS = "adapter_model-*-of-*"
_OF_RANKS = ("pytorch_model_fsdp*", "global_step*", "*.distcp")  # FSDP, DeepSpeed, torch.distributed


def plan_files(config: bytes, weights: Path, base: BaseDescription, limits: AdapterLimits) -> AdapterPlan:
    """What an adapter's two files say. Raises AdapterRejected: see config, safetensors_header and validate. OSError."""
    limits = limits.with_experts(sum(shape.num_experts for shape in base.experts.values()))
    return plan_adapter(parse_config(config, limits), read_header(weights, limits), base, limits)


def plan_folder(folder: Path, base: BaseDescription, limits: AdapterLimits | None = None) -> AdapterPlan:
    """The same of a folder with both files."""
    return plan_files((folder / CONFIG_FILE).read_bytes(), folder / WEIGHTS_FILE, base, limits or AdapterLimits())


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """config: the bytes of adapter_config.json. weights: safetensors, or the .bin of a PEFT before 0.7.

    notes: what else the folder holds and is not used, a sentence each.
    """

    config: bytes
    weights: Path
    notes: tuple[str, ...]


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """The adapter that PEFT saved in `folder`, or in the snapshot of it if that is a repository in a hub cache.

    Raises AdapterRejected: missing_config, git_lfs_pointer, unsupported_format, pickle, sharded_weights,
    missing_weights.
    """
    folder = _snapshot_in(folder)
    path = folder / CONFIG_FILE
    _refuse_broken_link(path)
    if not path.is_file():
        raise AdapterRejected(
            "missing_config", f"{folder}: no {CONFIG_FILE} there; {_instead_of(folder)}", param="config"
        )
    config = path.read_bytes()
    refuse_lfs_pointer(config, "config", CONFIG_FILE)
    body = _object_in(path)
    if body and "peft_type" not in body:
        refuse_foreign_keys(body)
    return AdapterFolder(config, _weights_in(folder), _notes(folder))


def _snapshot_in(folder: Path) -> Path:
    """models--OWNER--NAME -> the snapshot that refs/main names, or its only one; any other folder itself."""
    snapshots = sorted(path.parent for path in folder.glob(f"snapshots/*/{CONFIG_FILE}"))
    main = folder / "refs" / "main"
    named = [path for path in snapshots if main.is_file() and path.name == main.read_text().strip()]
    return (named or [folder])[0] if len(snapshots) != 1 else snapshots[0]


def _refuse_broken_link(path: Path) -> None:
    """A hub cache's files are links to its blobs/."""
    if path.is_symlink() and not path.exists():
        code, param = ("missing_config", "config") if path.name == CONFIG_FILE else ("missing_weights", "weights")
        message = f"{path}: a link to a file that is gone; the download is incomplete (`hf download` resumes it)"
        raise AdapterRejected(code, message, param=param)


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, BIN_FILE):
        path = folder / name
        _refuse_broken_link(path)
        if path.is_file():
            if name == BIN_FILE:
                with path.open("rb") as stream:
                    refuse_lfs_pointer(stream.read(HEAD_BYTES), "weights", name)
            return path
    raise _without_weights(folder)


def _instead_of(folder: Path) -> str:
    """What a folder without an adapter_config.json is, and what to push."""
    inner = sorted((path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")), key=_by_number)
    if snapshots := sorted(path.parent.name for path in folder.glob(f"snapshots/*/{CONFIG_FILE}")):
        first = folder / "snapshots" / snapshots[0]
        return f"a hub cache with {len(snapshots)} snapshots: push one of them, as in {first}"
    if inner:
        shown = ", ".join(inner[:MAX_SHOWN])
        return f"folders in it have one ({shown}): push one of those, as in {folder / inner[-1]}"
    if (folder / "config.json").is_file():
        return "it is a whole model, not an adapter: serve it as a base (multilora serve --base)"
    return "a folder saved by PEFT (save_pretrained) is needed"


def _by_number(name: str) -> tuple[str, int, str]:
    """checkpoint-500 before checkpoint-1000."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number), name) if number.isascii() and number.isdigit() and len(number) < 20 else (name, 0, name)


def _without_weights(folder: Path) -> AdapterRejected:
    """Says what there is in place of adapter_model.safetensors."""
    if any(folder.glob(f"{_SHARDS}.safetensors")):
        return AdapterRejected(
            "sharded_weights", f"{folder}: the weights come in shards. {SHARDS_ADVICE}", param="weights"
        )
    if sharded := [path.name for pattern in _OF_RANKS for path in folder.glob(pattern)]:
        message = f"{folder}: a checkpoint in parts of several ranks ({min(sharded)}), without {WEIGHTS_FILE}"
        way_out = "load it with the trainer that wrote it and save the adapter whole (trainer.save_model)"
        return AdapterRejected("sharded_weights", f"{message}; {way_out}", param="weights")
    if found := sorted({*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")}):
        message = f"{folder}: no {WEIGHTS_FILE} there, and {found[0].name} is a pickle, which is never opened"
        return AdapterRejected(
            "pickle", f"{message}; load it with PEFT and save it with save_pretrained", param="weights"
        )
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:MAX_SHOWN])
    rest = f"; it holds {others}, which PEFT does not load either" if others else ""
    return AdapterRejected("missing_weights", f"{folder}: no {WEIGHTS_FILE} there{rest}", param="weights")


def _notes(folder: Path) -> tuple[str, ...]:
    """What the adapter was trained with and is not served with: its own chat template, tokens of its own."""
    notes = []
    if template := _template_in(folder):
        notes.append(
            f"{template} brings a chat template, which is not used: chats are rendered by the base's. "
            "If they differ, push it with --chat-template, or render prompts yourself and use /v1/completions"
        )
    if tokens := _added_tokens(folder):
        shown = ", ".join(tokens[:MAX_SHOWN]) + (", ..." if len(tokens) > MAX_SHOWN else "")
        notes.append(
            f"added_tokens.json adds {len(tokens)} tokens ({shown}), which are not used: the base's tokenizer makes "
            "tokens of texts. Where that lacks them, put this tokenizer into the base's folder, or send token ids"
        )
    return tuple(notes)


def _template_in(folder: Path) -> str | None:
    """The file that holds a chat template."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            return name
    return "tokenizer_config.json" if _object_in(folder / "tokenizer_config.json").get("chat_template") else None


def _added_tokens(folder: Path) -> list[str]:
    return [str(token)[:40] for token in _object_in(folder / "added_tokens.json")]


def _object_in(path: Path) -> dict[str, object]:
    """The JSON object of a file, {} if it holds none: the store judges what is unreadable, or it is not needed."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return {}
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}

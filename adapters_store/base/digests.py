"""The identity of a base: what its config says and its weight files hold. Large files are hashed once, and remembered
by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adapters_store.base.folder import weight_files
from adapters_store.filesystem import Filesystem, file_sha256
from lora_kernels.native.build import cache_dir

_log = logging.getLogger(__name__)

VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


def remembered(values: Mapping[str, Callable[[], str]]) -> list[str]:
    """The value of each key; made only if no process of this user made it before."""
    known = _known()
    made = {key: make() for key, make in values.items() if key not in known}
    if made:
        _remember(made)
    return [made[key] if key in made else known[key] for key in values]


def file_digests(files: Iterable[Path]) -> list[str]:
    """The hex digest of each file's content. Only files that are new or changed are read."""
    return remembered({_key(file): partial(file_sha256, file) for file in files})


def base_digest(path: Path) -> str:
    """sha256 over the config and every weight file's content; remembered per file by size and time of change."""
    total = hashlib.sha256(_canonical_config(path))
    weight_files(path)  # raises if there are none
    files = sorted(path.glob("*.safetensors"))
    for file, digest in zip(files, file_digests(files), strict=True):
        total.update(file.name.encode() + b"\0" + digest.encode())
    return f"sha256:{total.hexdigest()}"


def _canonical_config(path: Path) -> bytes:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    lasting = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    return json.dumps(lasting, sort_keys=True, separators=(",", ":")).encode()


def _key(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _file() -> Path:
    return cache_dir() / "base-digests.json"


def _known() -> dict[str, str]:
    """Nothing if the file is missing, unreadable or damaged: all is made again then."""
    try:
        known = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(made: Mapping[str, str]) -> None:
    """Beside what others have remembered meanwhile: making a value may take minutes. A folder that cannot be written
    costs the time to make it again, no more."""
    try:
        target = _file()
        target.parent.mkdir(parents=True, exist_ok=True)
        Filesystem().write_atomic(target, json.dumps({**_known(), **made}).encode(), durable=False)
    except OSError as error:
        _log.warning("what was read of a base is not remembered, and is read again next time: %s", error)

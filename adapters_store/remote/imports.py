"""Adapters that an operator names by their place: a prefix of an object store, or a folder of a hub cache.

Only places under an allowed prefix are read; whole path segments are compared, so `.../1` does not allow `.../10`. The
object store's address comes from this server's environment, never from the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_store.errors import InputRefused
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.parsing.strict_json import shown

_SCHEMES = ("s3", "gs", "az")
_UNUSED = set("%?#\\@*")  # what a URL could hide another place behind


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """prefixes: where sources may lie; empty: nowhere; None: anywhere, for an operator at the shell."""

    prefixes: tuple[str, ...] | None
    max_config_bytes: int
    max_weights_bytes: int


def fetch_import(source: str, target: Path, limits: ImportLimits, require_room: Callable[[int], None]) -> bytes:
    """Copy the weights to `target`, a new file; returns the config. require_room: is called with their size first.

    Raises InputRefused (source_not_allowed, source_not_found, too_large), StoreUnavailable (blobs_unavailable), and
    what `require_room` raises.
    """
    if source.startswith("/") and source.isprintable():
        return _from_folder(source, target, limits, require_room)
    segments = _segments(source)
    if limits.prefixes is not None:
        _require_allowed(segments, [_segments(each) for each in limits.prefixes if "://" in each], source)
    from adapters_store.remote.bucket import Bucket  # late: settings check prefixes by this module

    bucket = Bucket.at(source)
    sizes = {name: bucket.head(name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for name, found in sizes.items():
        _check_size(name, None if found is None else found.num_bytes, limits, source)
    config = bucket.read(CONFIG_FILE)
    if config is None:
        raise _not_found(source, CONFIG_FILE)
    try:
        bucket.get(WEIGHTS_FILE, target, require_room)
    except FileNotFoundError:
        raise _not_found(source, WEIGHTS_FILE) from None
    return config


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a text that is no prefix of sources."""
    if prefix.startswith("/"):
        return
    try:
        _segments(prefix)
    except InputRefused as error:
        raise ValueError(f"import_prefix must be s3://BUCKET/PREFIX, gs://, az:// or a folder: {error}") from None


def _from_folder(source: str, target: Path, limits: ImportLimits, require_room: Callable[[int], None]) -> bytes:
    """A hub cache links its files to others of itself; links to anywhere else are refused."""
    prefixes = ("/",) if limits.prefixes is None else limits.prefixes
    roots = [Path(each).resolve() for each in prefixes if each.startswith("/")]
    files = {name: (Path(source) / name).resolve() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for name, path in files.items():
        if not any(path.is_relative_to(root) for root in roots):
            raise _not_allowed(source)
        _check_size(name, path.stat().st_size if path.is_file() else None, limits, source)
    require_room(files[WEIGHTS_FILE].stat().st_size)
    shutil.copyfile(files[WEIGHTS_FILE], target)
    return files[CONFIG_FILE].read_bytes()


def _segments(url: str) -> list[str]:
    scheme, _, rest = url.partition("://")
    segments = rest.rstrip("/").split("/")
    is_plain = url.isprintable() and not _UNUSED & set(url) and not {"", ".", ".."} & set(segments)
    if scheme not in _SCHEMES or not is_plain:
        raise InputRefused(
            "source_not_allowed", f"source: {shown(url)} is no s3://, gs:// or az:// place", param="source"
        )
    return [scheme, *segments]


def _require_allowed(segments: list[str], prefixes: Sequence[list[str]], source: str) -> None:
    if not any(segments[: len(prefix)] == prefix for prefix in prefixes):
        raise _not_allowed(source)


def _check_size(name: str, num_bytes: int | None, limits: ImportLimits, source: str) -> None:
    if num_bytes is None:
        raise _not_found(source, name)
    most = limits.max_config_bytes if name == CONFIG_FILE else limits.max_weights_bytes
    if num_bytes > most:
        raise InputRefused(
            "too_large", f"source: {name} must have at most {most} bytes, got {num_bytes}", param="source"
        )


def _not_allowed(source: str) -> InputRefused:
    message = f"source: {shown(source)} is under no prefix that --import-prefix allows"
    return InputRefused("source_not_allowed", message, param="source")


def _not_found(source: str, name: str) -> InputRefused:
    return InputRefused("source_not_found", f"source: no {name} in {shown(source)}", param="source")

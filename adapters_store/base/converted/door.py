"""A GGUF file, a folder of 8-bit floats, or the text side of a model of text and pictures as a base: converted once
into a folder of the user's cache, found there again by the digest of what was converted.

A folder appears under its name only when it is whole, whatever ends the conversion; its weights are compared with their
digests before it is used again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters_store.base.converted.header import Header, read_header
from adapters_store.base.converted.llama import config_of, names_of, refuse_other_kinds
from adapters_store.base.digests import base_digest, file_digests
from adapters_store.base.families import TEXT_SIDES, UnsupportedBase
from adapters_store.base.folder import CONFIG, read_json
from adapters_store.filesystem import file_lock
from lora_kernels.native.build import cache_dir

SUFFIX = ".gguf"
EXTRA = "gguf"
_FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
_FORM = 1  # counts changes of what a conversion writes
_RECORD = "converted.json"
_UNFINISHED = ".converting-"
_SPARE_BYTES = 64 << 20  # for the tokenizer and the shards' headers
_ODD = re.compile(r"[^A-Za-z0-9._-]+")


class Convertible(Protocol):
    """What a base is converted from. stored: how its values are stored. does: what the conversion does, for a line."""

    @property
    def path(self) -> Path: ...
    @property
    def stored(self) -> str: ...
    @property
    def does(self) -> str: ...
    @property
    def plain_bytes(self) -> int: ...
    def write(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class GgufBase:
    """A file that can be served. stored: how most of its values are stored, such as Q4_1."""

    header: Header
    config: dict[str, Any]

    @property
    def stored(self) -> str:
        values: Counter[str] = Counter()
        for tensor in self.header.tensors:
            values[tensor.stored.name] += math.prod(tensor.shape)
        return values.most_common(1)[0][0]

    @property
    def does(self) -> str:
        return f"{self.stored} weights, dequantised to bfloat16"

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def plain_bytes(self) -> int:
        """Of its weights in bfloat16."""
        return sum(tensor.plain_bytes for tensor in self.header.tensors)

    def write(self, folder: Path) -> None:
        """The same base, plain, in `folder`. Raises UnsupportedBase, OSError."""
        from adapters_store.base.converted.convert import write_folder

        write_folder(self.header, self.config, folder)


def is_gguf(path: Path) -> bool:
    """Whether this names a GGUF file, by its suffix."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def opened_gguf(path: Path) -> GgufBase:
    """What the file's header says. Raises UnsupportedBase, OSError."""
    header = read_header(path)
    refuse_other_kinds(header)
    config = config_of(header)
    names_of(header, config)
    return GgufBase(header, config)


def is_fp8(path: Path) -> bool:
    """Whether this is a folder whose config says that weights are 8-bit floats."""
    stored = _config_in(path).get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") in _FP8_METHODS


def has_text_side(path: Path) -> bool:
    """Whether this is a folder of a model of text and pictures whose text side is served."""
    architectures = _config_in(path).get("architectures")
    return isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in TEXT_SIDES


def _config_in(folder: Path) -> dict[str, Any]:
    """Empty where there is none that can be read: `describe_base` says why."""
    if not (folder / CONFIG).is_file():
        return {}
    try:
        return read_json(folder / CONFIG)
    except (UnsupportedBase, OSError):
        return {}


def is_converted(path: Path) -> bool:
    """Whether `folder_of` makes a folder of this."""
    return is_gguf(path) or is_fp8(path) or has_text_side(path)


def folder_of(path: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of what `is_converted`, as a plain base, made now if there is none. Another path is returned as it is.

    say: hears what a conversion does. Raises UnsupportedBase, OSError.
    """
    if not is_converted(path):
        return path
    name, digest = _identity(path)
    target = _bases() / f"{_ODD.sub('-', name)[:80]}-{digest[:16]}-{_FORM}"
    if _is_whole(target):
        return target
    base = _opened(path)
    with _alone(target.parent):
        if not _is_whole(target):
            say(f"{path}: {base.does} in {target}")
            _convert(base, target)
    return target


def _identity(path: Path) -> tuple[str, str]:
    """A name for the folder, and the digest of what is converted."""
    if is_gguf(path):
        return path.stem, file_digests([path])[0]
    return path.resolve().name, base_digest(path).removeprefix("sha256:")


def _opened(path: Path) -> Convertible:
    if is_gguf(path):
        _need_package()
        return opened_gguf(path)
    from adapters_store.base.converted.fp8 import Fp8Base
    from adapters_store.base.converted.text_side import TextSide

    return TextSide(path) if has_text_side(path) else Fp8Base(path)


def _bases() -> Path:
    return cache_dir() / "bases"


def _convert(base: Convertible, target: Path) -> None:
    _need_room(base, target.parent)
    scratch = target.with_name(f"{_UNFINISHED}{target.name}")
    scratch.mkdir()
    try:
        _write(base, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)  # one whose weights changed
    scratch.replace(target)


def _write(base: Convertible, scratch: Path) -> None:
    from adapters_store.base.files import describe_base
    from adapters_store.base.tokenizer import load_tokenizer

    base.write(scratch)
    try:
        describe_base(scratch)
        load_tokenizer(scratch)
    except UnsupportedBase as error:
        raise UnsupportedBase(error.message.replace(str(scratch), str(base.path))) from error
    files = sorted(scratch.glob("*.safetensors"))
    record = {"source": base.path.name, "stored": base.stored}
    digests = dict(zip((file.name for file in files), file_digests(files), strict=True))
    (scratch / _RECORD).write_text(json.dumps({**record, "digests": digests}))


def _is_whole(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / _RECORD).read_text())["digests"]
        return file_digests([folder / name for name in digests]) == list(digests.values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextmanager
def _alone(bases: Path) -> Iterator[None]:
    """One conversion at a time; what a killed one left behind is removed."""
    bases.mkdir(parents=True, exist_ok=True)
    with file_lock(bases / ".lock", exclusive=True):
        for left in bases.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _need_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedBase(f"a GGUF file needs the package gguf to be read: pip install 'multilora[{EXTRA}]'")


def _need_room(base: Convertible, bases: Path) -> None:
    needed, free = base.plain_bytes + _SPARE_BYTES, shutil.disk_usage(bases).free
    if free < needed:
        reason = f"its weights take {needed >> 20} MiB in bfloat16, {bases} has {free >> 20} MiB left"
        raise UnsupportedBase(f"--base {base.path}: {reason}; free some, or set XDG_CACHE_HOME to a larger disk")

"""Finds and describes the base a user names: a folder, a GGUF file, or a hub id with a local copy. Fetches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters_store.base.converted.door import folder_of, is_gguf
from adapters_store.base.families import UnsupportedBase
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.output import Output

if TYPE_CHECKING:
    from adapters_store.base.description import BaseDescription

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]*(/[A-Za-z0-9][A-Za-z0-9._\-]*)?")

BASE_FORMS = "a folder, a .gguf file of the llama architecture, or a hub id with a local copy"

BaseOption = Annotated[
    str | None,
    typer.Option("--base", help=f"The base: {BASE_FORMS}.", metavar="PATH_OR_ID"),
]


def find_base(path_or_id: str, output: Output | None = None) -> tuple[Path, str]:
    """The base's folder, and the name it is served under unless another is given. A GGUF file is converted to one, a
    folder of 8-bit floats to a plain one.

    Raises CommandError (base_not_found) where there is neither such a folder nor a local copy, UnsupportedBase.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _converted(path, output), path.resolve().name
    if is_gguf(path):
        return _converted(path, output), path.stem
    if path.is_file():
        message = f"--base {path_or_id}: a file; the folder of a transformers model, or a .gguf file, is needed"
        raise CommandError("base_not_found", message, ExitCode.NOT_FOUND)
    if _HUB_ID.fullmatch(path_or_id) is None:
        raise CommandError("base_not_found", f"--base {path_or_id}: no such folder", ExitCode.NOT_FOUND)
    return _converted(_local_copy(path_or_id), output), path_or_id.rpartition("/")[2]


def _converted(path: Path, output: Output | None) -> Path:
    """Says what it does: the first time takes a while, and values that were quantised become bfloat16."""

    def say(text: str) -> None:
        if output is not None:
            output.event("stage", stage=text)
            output.say(text)

    return folder_of(path, say)


def _local_copy(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        message = (
            f"--base {hub_id}: no such folder, and no local copy of a model of that id; nothing is downloaded here. "
            f"Get it with `hf download {hub_id}`, or give the path of a folder"
        )
        raise CommandError("base_not_found", message, ExitCode.NOT_FOUND) from error


def describe(base: Path, name: str) -> BaseDescription:
    """The base's identity and layers, from its files alone. Raises UnsupportedBase."""
    with faults_of_the_base(base):
        from adapters_store.base.files import describe_base

        return describe_base(base, name=name)


@contextmanager
def faults_of_the_base(base: Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise for files they cannot read into UnsupportedBase.

    They raise ValueError, and OSError without an errno, for a folder with wrong content.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise UnsupportedBase(f"--base {base}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnsupportedBase(f"--base {base}: {error}") from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise CommandError("out_of_memory", f"not enough memory: {reason}", ExitCode.UNSUPPORTED) from error

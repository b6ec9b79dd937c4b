"""Other projects' LoRA kernels, read from a checkout that the user names; none of their code is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.others import sglang, vllm
from benchmarks.gpu.others.job import MakeCalls
from benchmarks.gpu.others.load import find_source

PROJECTS = (vllm, sglang)


def ways_of(path: Path, say: Callable[[str], None]) -> dict[str, MakeCalls]:
    """What can be measured of a checkout, by name. Says why if there is nothing."""
    found: dict[str, MakeCalls] = {}
    sources = [(project, find_source(path, project.NAME, project.FOLDERS)) for project in PROJECTS]
    for project, source in sources:
        if source is None:
            continue
        try:
            found |= project.ways(source)
        except Exception as error:  # noqa: BLE001  whatever their files do when they are imported
            say(f"{project.NAME} in {path}: left out, {type(error).__name__}: {error}")
    if not any(source for _, source in sources):
        folders = ", ".join(folder for project in PROJECTS for folder in project.FOLDERS)
        say(f"{path}: left out, holds none of {folders}")
    return found

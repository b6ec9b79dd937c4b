"""Imports single files of another project without its packages. Knows modules and names; knows no kernels.

A folder of kernels is imported as it lies, its `__init__` files left out. Every other module of that project is a
stand-in that has only the names given for it, wherever the project keeps them in this version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Source:
    """One checkout. name: its package. folder: where the kernels lie, from the checkout's import root."""

    name: str
    root: Path
    folder: str

    @property
    def package(self) -> str:
        return self.folder.replace("/", ".")


def find_source(path: Path, name: str, folders: Sequence[str]) -> Source | None:
    """path: a checkout, its package, or a site-packages folder. The first of the folders that is there."""
    for root in (path, path / "python", path.parent):
        for folder in folders:
            if (root / folder).is_dir():
                return Source(name, root, folder)
    return None


@contextmanager
def importable(source: Source, names: Mapping[str, object]) -> Iterator[None]:
    """Inside, the source's kernels can be imported; afterwards no module of its name is left. ImportError names what
    a kernel's file wants beyond `names`."""
    finder = _Finder(source, names)
    hidden = _forget(source.name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(source.name)
        sys.modules.update(hidden)


def _forget(name: str) -> dict[str, ModuleType]:
    own = [key for key in sys.modules if key == name or key.startswith(f"{name}.")]
    return {key: sys.modules.pop(key) for key in own}


class _StandIn(ModuleType):
    """A module that has the given names, and raises ImportError if it is called as a function."""

    def __init__(self, name: str, names: Mapping[str, object]) -> None:
        super().__init__(name)
        self.__dict__.update(names)

    def __call__(self, *_: object, **__: object) -> object:
        raise ImportError(f"{self.__name__} is used and has no substitute")


class _Finder(MetaPathFinder, Loader):
    """Gives stand-ins for all of a project but the folder of its kernels."""

    def __init__(self, source: Source, names: Mapping[str, object]) -> None:
        self._source, self._names = source, names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = self._source.package
        if name.partition(".")[0] != self._source.name or name.startswith(f"{package}."):
            return None
        spec = ModuleSpec(name, self, is_package=True)
        if name == package:
            spec.submodule_search_locations = [str(self._source.root / self._source.folder)]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, self._names)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in is complete when it is made."""

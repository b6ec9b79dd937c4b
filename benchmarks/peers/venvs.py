"""A peer's own virtual environment, made at its first use: what it needs must not meet what we need."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.timing import Say

DEFAULT_FOLDER = Path("build/peers")


def peers_folder() -> Path:
    """Where peers are installed; MULTILORA_BENCH_PEERS moves it."""
    own = os.environ.get("MULTILORA_BENCH_PEERS")
    return Path(own).absolute() if own else DEFAULT_FOLDER.absolute()


@dataclass(frozen=True, slots=True)
class Package:
    """name: of the peer and its folder. distribution, version: installed by name. build: variables for a package that
    is compiled here. without: what it brings and does not need, if that is made for another machine. finish: a
    module whose first import ends the installation."""

    name: str
    distribution: str
    version: str
    build: Mapping[str, str]
    without: tuple[str, ...] = ()
    finish: str | None = None

    @property
    def folder(self) -> Path:
        return peers_folder() / self.name

    @property
    def packages(self) -> Path | None:
        """Its site-packages, if this version is installed."""
        info = f"{self.distribution.replace('-', '_')}-{self.version}.dist-info"
        return next((found.parent for found in self.folder.glob(f"lib/python*/site-packages/{info}")), None)

    def installed(self, say: Say) -> Path:
        """Its site-packages. Installs it if it is missing; CalledProcessError if that fails."""
        if self.packages is None:
            say(f"installing {self.distribution}=={self.version} into {self.folder}, once")
            venv.create(self.folder, with_pip=True, clear=True)  # an install that was cut off leaves half of one
            pip = [str(self.folder / "bin" / "python"), "-m", "pip"]
            subprocess.run(
                [*pip, "install", "--quiet", f"{self.distribution}=={self.version}"],
                env={**os.environ, **self.build},
                check=True,
            )
            if self.without:
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *self.without], check=True)
        if self.finish is not None:
            subprocess.run([str(self.folder / "bin" / "python"), "-c", f"import {self.finish}"], check=True)
        assert self.packages is not None
        return self.packages

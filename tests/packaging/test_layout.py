"""The repository's own promises: import floors, and no package that others take for theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from lora_kernels.process import NO_COMPILER

ROOT = Path(__file__).parents[2]
PRODUCT = ("server", "adapters_store", "kernels", "trainer")
SOURCES = {".py", ".c", ".h"}
MAX_MODULES = 12
JS_IMPORT = re.compile(r'(?:from |import\()"\./([\w-]+\.js)"')


def test_kernels_folder_is_no_package() -> None:
    """transformers and bitsandbytes import a top-level `kernels` if they find one, and then fail. The commands keep
    bitsandbytes from importing torch's compiler."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "from lora_kernels.process import compile_nothing; compile_nothing(); import sys, transformers, bitsandbytes; "
        "from transformers.utils import import_utils; print('imported', 'torch._inductor.compile_fx' in sys.modules)"
    )
    bare = {name: value for name, value in os.environ.items() if name != NO_COMPILER}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported False", done.stderr


def test_imports_go_downward_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]  # `make lint` may write it just now
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_no_two_modules_import_each_other() -> None:
    """Neither directly nor around, in Python and in the console's page."""
    graph = grimp.build_graph("server", "adapters_store", "lora_kernels", "trainer", "benchmarks", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    page = ROOT / "server" / "api" / "console" / "page"
    scripts = {path.name: set(JS_IMPORT.findall(path.read_text())) for path in page.glob("*.js")}
    assert "server.engine.request" in imports["server.engine.engine"]
    assert "job.js" in scripts["jobs.js"]
    for arrows in (imports, scripts):
        TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_no_folder_of_product_code_has_more_than_twelve_modules() -> None:
    """A reader finds the right one among twelve; `__init__.py` is not counted."""
    folders = {path.parent for top in PRODUCT for path in (ROOT / top).rglob("*") if path.suffix in SOURCES}
    sizes = {
        str(folder.relative_to(ROOT)): sum(
            path.suffix in SOURCES and path.name != "__init__.py" for path in folder.iterdir()
        )
        for folder in folders
    }
    assert len(sizes) > 40
    assert {folder: size for folder, size in sizes.items() if size > MAX_MODULES} == {}


def test_every_package_with_rooms_has_a_contract_between_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = {container for contract in contracts for container in contract.get("containers", ())}
    with_rooms = {
        "server.cli",
        "server.api",
        "server.jobs",
        "server.engine",
        "adapters_store",
        "lora_kernels",
        "trainer",
    }
    assert with_rooms - held == set()

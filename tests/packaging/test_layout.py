"""The repository's own promises: import floors, and no package that others take for theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernels_folder_is_no_package() -> None:
    """transformers and bitsandbytes import a top-level `kernels` if they find one, and then fail."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers, bitsandbytes; from transformers.utils import import_utils; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported", done.stderr


def test_imports_go_downward_only() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout

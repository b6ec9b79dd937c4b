"""Every environment variable that the product reads, beside those of command options. Written by hand; a test compares
the names with the sources."""

from __future__ import annotations

import re
from pathlib import Path

from server.cli.serve.settings import SERVE_SETTINGS
from support.reference.table import table

ROOT = Path(__file__).parents[3]
PACKAGES = ("adapters_store", "kernels", "server", "trainer")
VARIABLES = {
    "MULTILORA_ADMIN_KEY": ("from `admin.key`", "the admin key; two, separated by a space, during a change"),
    "MULTILORA_DATABASE_URL": ("SQLite in the data directory", "the database; `--database-url` goes before it"),
    "MULTILORA_NATIVE": ("`on`", "`off`: do not build or load the C kernels; torch computes instead"),
    "MULTILORA_TORCH_OPS": ("none", "operations that torch computes instead of Triton kernels, as in `lora,nf4`"),
    "MULTILORA_OMP_NUM_THREADS": ("unset", "set by the server: the count it chose itself"),
    "MULTILORA_BUSY_THREADS": ("unset", "set by the job worker: a training's threads while other programs work"),
    "MLFLOW_EXPERIMENT_NAME": ("`multilora`", "the experiment of trainings that are shown in MLflow"),
    "WANDB_PROJECT": ("`multilora`", "the project of trainings that are shown in W&B"),
    "CC": ("`cc`, else `gcc`", "the C compiler that builds the C kernels at the first start"),
    "XDG_CACHE_HOME": ("`~/.cache`", "where the built C kernels are kept (`multilora/` in it)"),
    "OMP_NUM_THREADS": ("from the CPUs and the container's quota", "compute threads; `--threads` goes before it"),
    "OMP_WAIT_POLICY": ("unset", "if it is set, the server leaves `GOMP_SPINCOUNT` alone"),
    "GOMP_SPINCOUNT": ("`2000`", "spins of a waiting compute thread before it sleeps"),
    "MALLOC_ARENA_MAX": ("`4`", "glibc's arenas; more of them keep more freed memory"),
    "MALLOC_MMAP_THRESHOLD_": ("`1048576` in a training", "larger blocks go back to the system when freed"),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": ("`64`", "compiled products that oneDNN keeps, about 0.7 MB each"),
    "LRU_CACHE_CAPACITY": ("`1`", "descriptions of products that torch keeps beside them"),
    "TORCHDYNAMO_DISABLE": ("`1`", "torch's compiler, which nothing here uses, is not imported"),
    "PYTORCH_ALLOC_CONF": ("`expandable_segments:True`", "torch's allocator on a GPU"),
    "PYTORCH_CUDA_ALLOC_CONF": ("unset", "its older name: if it is set, the server sets neither"),
    "CUDA_VISIBLE_DEVICES": ("all", "the GPUs whose free memory a training's is compared with"),
    "RANK": ("unset", "set by torchrun for a sharded training, with `LOCAL_RANK` and `WORLD_SIZE`"),
    "LOCAL_RANK": ("`0`", "the GPU of this process"),
    "WORLD_SIZE": ("`1`", "the number of processes of a sharded training"),
}  # fmt: skip


def section() -> str:
    rows = [(f"`{name}`", default, meaning) for name, (default, meaning) in sorted(VARIABLES.items())]
    return table(("variable", "default", "meaning"), rows)


def names_in_sources() -> set[str]:
    """Every variable but a setting's that a source file names near `environ`, by its own name or by a constant's."""
    of_settings = {name for each in SERVE_SETTINGS.values() for name in each.environment}
    return {name for path in _sources() for name in _names_in(path.read_text())} - of_settings


def _sources() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def _names_in(text: str) -> set[str]:
    constants = dict(re.findall(r"^(\w+)(?:: \w+)? = \"([A-Z][A-Z0-9_]+)\"", text, flags=re.MULTILINE))
    asked = re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\s*\"?(\w+)\"?", text)
    asked += re.findall(r"\"?(\w+)\"? (?:not )?in os\.environ", text)
    imported = set(re.findall(r"import \w+ as (\w+)$", text, flags=re.MULTILINE))  # found in its own file
    return {constants.get(name, name) for name in asked if constants.get(name, name).isupper()} - imported

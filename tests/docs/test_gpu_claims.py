"""The README gives no figure of a GPU before a run on one has left its results in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GPU = re.compile(r"\b(GPUs?|CUDA|H100|H200|A100|L4|4090|B200)\b")
FIGURE = re.compile(
    r"\d[\d,.]*\s?(ms|µs|us|s|tok|tokens|times|%|GB|MiB|GiB|x)(?!\w)|\d+ (tokens|requests) (a|per) second"
)
RESULTS = ROOT / "benchmarks" / "results"


def runs_on_a_gpu() -> list[Path]:
    """Result files of the GPU suite whose device was one."""
    files = RESULTS.rglob("gpu_suite*.json")
    return [
        file for file in files if any("CPU" not in part["device"] for part in json.loads(file.read_text()).values())
    ]


def sentences(text: str) -> list[str]:
    prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    return re.split(r"(?<=[.:|])\s+", " ".join(prose.split()))


def figures_of_a_gpu(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if GPU.search(sentence) and FIGURE.search(sentence)]


def test_the_readme_gives_no_figure_of_a_gpu_that_was_not_run() -> None:
    text = (ROOT / "README.md").read_text()
    if runs_on_a_gpu():
        assert "benchmarks/results" in text
        return
    assert figures_of_a_gpu(text) == []
    assert "nothing has run or been measured there" in " ".join(text.split())


def test_such_a_figure_would_be_found() -> None:
    assert figures_of_a_gpu("Fast. A decode step on an H100 takes 4.8 ms. Slow.") == [
        "A decode step on an H100 takes 4.8 ms."
    ]
    assert figures_of_a_gpu("On a GPU adapters cost 5 % of a step.")
    assert figures_of_a_gpu("A GPU is not needed. A laptop takes 4 minutes.") == []

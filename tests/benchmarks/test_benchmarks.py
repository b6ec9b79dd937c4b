"""Every benchmark goes end to end in its --quick form and leaves a CSV whose rows say where they come from."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.all import NAMES

MACHINE_COLUMNS = {"hardware", "threads", "torch", "date", "quick"}
EXPECTED = {
    "op_lora": (60, {"implementation", "us", "gb_per_s", "of_read_bandwidth", "times_native", "max_error"}),
    "op_linear": (20, {"layer", "rows", "us_ours", "us_library", "library_over_ours", "max_error_ours"}),
    "layer": (40, {"group", "rows", "case", "us", "times_bare"}),
    "model_tax": (7, {"batch", "adapters", "tok_per_s", "of_base", "decode_of_base", "ttft_ms", "itl_ms"}),
    "versus_peft": (5, {"ours_tok_per_s", "theirs_tok_per_s", "ours_over_theirs", "same_first_token"}),
    "paging": (6, {"measure", "case", "of_resident", "of_quiet", "copies_per_request", "itl_p95_ms"}),
    "server_load": (4, {"popularity", "tok_per_s", "of_base", "ttft_p95_ms", "tpot_p50_ms"}),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where results go; bases and stores are made anew in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_BENCH_CACHE", str(tmp_path_factory.mktemp("bench-cache")))
        yield tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def rows_of(out: Path) -> dict[str, list[dict[str, str]]]:
    """Filled by each benchmark's test, for the claims below."""
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_quick_form_runs_and_writes_csv_and_plot(
    name: str, out: Path, rows_of: dict[str, list[dict[str, str]]]
) -> None:
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(out)])
    with (out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows_of[name] = rows
    count, columns = EXPECTED[name]
    assert len(rows) == count
    assert columns | MACHINE_COLUMNS <= rows[0].keys()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    speeds = [float(row[key]) for row in rows for key in row if key.startswith(("us", "tok_per_s")) and row[key]]
    assert all(speed > 0 for speed in speeds)

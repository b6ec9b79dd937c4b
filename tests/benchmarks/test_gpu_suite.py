"""The GPU suite runs end to end at toy sizes without a GPU, goes on where it was cut off, and misses no package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import correctness
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS, USUAL, file_of, rows_file_of, run_part
from benchmarks.gpu.sizes import FULL
from benchmarks.gpu.summary import Results, results, table, wrong_cases
from benchmarks.gpu.targets import least_nf4, most_of_bare
from lora_kernels.triton_common.available import triton_switch

ROOT = Path(__file__).parents[2]
LACKING = ("sqlalchemy", "alembic", "fastapi", "uvicorn", "dbos", "bitsandbytes", "prometheus_client", "matplotlib")
WITHOUT = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {LACKING!r} else find_spec(name, *rest)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, on a Python that lacks what a borrowed machine lacks."""
    out = tmp_path_factory.mktemp("gpu")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--toy", "--out", str(out)]
    environment = {"PYTHONPATH": f"{site}:{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": str(out)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    (out / "log").write_text(run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return out


def test_every_part_leaves_rows_and_the_run_ends_with_the_table(toy: Path) -> None:
    found = results(toy, toy=True)
    assert list(found) == list(USUAL)
    assert all(result["rows"] for result in found.values())
    log = (toy / "log").read_text()
    assert "bitsandbytes is not installed" in log
    assert "matplotlib is not installed" in log
    assert log.rstrip().endswith(table(found).rstrip().splitlines()[-1].rstrip())
    assert json.loads((toy / "gpu_suite-toy.json").read_text()).keys() == found.keys()


def test_every_operation_is_compared_and_right(toy: Path) -> None:
    found = results(toy, toy=True)
    assert wrong_cases(found) == []
    names = " ".join(row["case"] for row in found["correctness"]["rows"])
    assert all(
        word in names
        for word in (
            "lora",
            "attention",
            "nf4",
            "norm",
            "gate",
            "rope",
            "rank 256",
            "prompt",
            "one_launch",
            "overlapped",
        )
    )


def test_each_measure_of_a_model_is_there(toy: Path) -> None:
    found = results(toy, toy=True)
    rows = found["model"]["rows"]
    assert {row["kind"] for row in rows} == {"start", "decode", "prefill", "activation", "storm"}
    bare = [row for row in rows if row["kind"] in ("decode", "prefill") and not row["adapters"]]
    assert all(row["of_bare"] == 1.0 for row in bare)
    assert {row["way"] for row in found["lora"]["rows"]} == {
        "ours",
        "gather_bmm",
        "loop",
        "one_launch",
        "overlapped",
    }


def test_what_is_done_is_not_run_again(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (toy / "parts").iterdir()}
    gpu_suite.main(["--toy", "--out", str(toy)])
    assert {path: path.stat().st_mtime_ns for path in (toy / "parts").iterdir()} == before
    assert capsys.readouterr().out.count("done before") == len(USUAL)


def test_tuning_tries_tiles_and_leaves_the_table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import tune
    from lora_kernels.lora import triton_launch as lora
    from lora_kernels.triton_common.tiles import device_tiles

    bench = Bench(torch.device("cpu"), toy=True)
    tried: list[object] = []
    monkeypatch.setattr(Bench, "seconds", lambda self, calls: tried.append(lora.device_tiles(self.device)) or 1e-6)
    rows = tune.run(bench)
    assert len(rows) == len(tried) == 4
    assert len({tiles.target_programs for tiles in tried}) == 3  # type: ignore[attr-defined]
    assert lora.device_tiles is device_tiles


def test_a_part_for_which_no_time_is_left_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_suite.main(["--out", str(tmp_path), "--budget-s", "1", "--only", "lora"])
    assert "lora: left out, no time is left" in capsys.readouterr().out
    assert not file_of(tmp_path, "lora", toy=False).exists()


def test_a_wrong_operation_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, "correctness", toy=False)
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": [{"case": "lora rank 3", "ok": False, "error": 0.5}]}))
    with pytest.raises(SystemExit, match="failed: correctness"):
        gpu_suite.main(["--out", str(tmp_path), "--only", "correctness"])
    assert "WRONG  lora rank 3" in capsys.readouterr().out


def test_a_part_that_is_cut_off_leaves_the_rows_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(bench: Bench) -> list[dict[str, object]]:
        bench.keep({"case": "lora rank 3", "ok": True})
        bench.keep({"case": "lora rank 8", "ok": False})
        raise KeyboardInterrupt

    monkeypatch.setattr(correctness, "run", cut_off)
    monkeypatch.setattr(triton_switch(), "on_cpu", False)
    with pytest.raises(KeyboardInterrupt):
        run_part("correctness", tmp_path, toy=True, seconds=9.0)
    with rows_file_of(tmp_path, "correctness", toy=True).open("a") as stream:
        stream.write('{"case": "half wri')
    found = results(tmp_path, toy=True)
    assert found["correctness"]["cut_off"]
    assert wrong_cases(found) == ["lora rank 8"]
    assert "1 of 2, cut off" in table(found)
    assert not file_of(tmp_path, "correctness", toy=True).exists()  # so that the next call runs it again


def test_a_part_that_is_cut_off_between_two_ways_has_its_line() -> None:
    case = {"kind": "decode", "rows": 8, "new": 1, "context": 2048}
    whole = [case | {"way": way, "us": us} for way, us in (("ours", 6.0), ("sdpa", 15.0))]
    found: Results = {"attention": {"cut_off": True, "rows": [*whole, case | {"rows": 32, "way": "ours", "us": 9.0}]}}
    lines = {line.partition("  ")[0]: " ".join(line.split()) for line in table(found).splitlines()}
    assert lines["paged attention / SDPA, decode"].endswith("2.50 (2.50..2.50) times as fast")
    assert lines["paged attention / SDPA, prefill"].endswith("not run")


def test_no_target_asks_for_more_than_the_bytes_allow() -> None:
    for rows, bound in ((32, 0.844), (64, 0.740)):
        assert most_of_bare(FULL, rows, rows) == pytest.approx(bound, abs=5e-4)
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in table({}).splitlines()}
    for rows in (32, 64):
        asked = float(lines[f"bf16 decode, {rows} rows on {rows} r16 / bare"].split()[1])
        assert asked < most_of_bare(FULL, rows, rows)
    asked = float(lines["NF4 step / bf16 step, 1 and 8 rows"].split()[1])
    assert max(least_nf4(FULL, rows) for rows in (1, 8)) < asked <= 0.75


def test_parts_and_summary_fit_into_nine_minutes() -> None:
    assert gpu_suite.BUDGET_S < 9 * 60
    assert sum(PARTS[name].seconds for name in USUAL) <= 600


def test_the_table_reads_figures_from_the_parts() -> None:
    decode: dict[str, object] = {"kind": "decode", "base": "bf16", "tok_per_s": 900.0, "of_floor": 0.8}
    found: Results = {
        "model": {
            "rows": [
                decode | {"rows": 1, "adapters": 0, "step_ms": 6.0, "of_bare": 1.0},
                decode | {"rows": 32, "adapters": 32, "step_ms": 7.0, "of_bare": 0.931},
                {"kind": "storm", "storm_over_quiet": 1.07},
            ]
        },
        "model_nf4": {"rows": [decode | {"rows": 1, "adapters": 0, "step_ms": 3.0}]},
        "lora": {"rows": [{"way": "ours", "mb": 9.0, "rows": 32, "of_bandwidth": share} for share in (0.5, 0.7, 0.8)]},
        "peft": {"rows": [{"kind": "peft", "rows": 32, "adapters": 8, "tok_per_s": 100.0}]},
    }
    case = {"model": "8b", "group": "o", "rows": 1, "adapters": 1, "ranks": "16"}
    found["lora"]["rows"] += [
        case | {"rows": rows, "way": way, "us": us, "mb": 1, "one_launch_mb": 2.0 * rows}
        for rows, *times in ((1, 6.0, 5.0), (2, 6.0, 7.0), (8, 6.0, 9.0))
        for way, us in zip(("ours", "one_launch"), times, strict=True)
    ]
    found["others"] = {"rows": [case | {"way": "ours", "us": 6.0}, case | {"way": "vllm", "us": 15.0}]}
    found["others"]["rows"].append(case | {"way": "sglang", "left_out": "ImportError: nothing"})
    text = table(found)
    lines = {line.partition("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert lines["LoRA in one launch / two, up to 8 rows"].endswith("0.86 (0.67..1.20) times as fast")
    assert lines["one_launch.max_bytes that these say"].endswith(" 4000000")
    assert lines["LoRA, expand started early / not"].endswith("not run")
    assert lines["LoRA kernels / vllm's"].endswith("2.50 (2.50..2.50) times as fast")
    assert lines["LoRA kernels / sglang's"].endswith("not run")
    assert "0.931" in text
    assert "0.70 (0.50..0.80)" in text
    assert "0.50" in text
    assert "9.0" in text
    assert "not run" in text

"""Every benchmark goes end to end in its --quick form and leaves a CSV whose rows say where they come from."""

from __future__ import annotations

import csv
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import model_tax, soak
from benchmarks.all import NAMES
from benchmarks.common.report import Report
from benchmarks.soak import FEWEST_ROWS
from lora_kernels.native.bindings import native_ops

MACHINE_COLUMNS = {"hardware", "threads", "torch", "date", "quick"}
EXPECTED = {
    "op_lora": (60, {"implementation", "us", "gb_per_s", "of_read_bandwidth", "times_native", "max_error"}),
    "op_linear": (40, {"layer", "dtype", "rows", "us_ours", "us_library", "library_over_ours", "max_error_ours"}),
    "op_nf4": (16, {"layer", "dtype", "rows", "us_ours", "bitsandbytes_over_ours", "unquantised_over_ours"}),
    "op_primitives": (3, {"setting", "mb", "ms", "times_own"}),
    "layer": (50, {"group", "rows", "case", "us", "times_bare", "times_lora"}),
    "model_tax": (8, {"batch", "adapters", "int8", "tok_per_s", "of_base", "decode_of_base", "ttft_ms", "itl_ms"}),
    "experts": (6, {"rows", "case", "step_ms", "times_base", "prompts_ms"}),
    "versus_peft": (5, {"ours_tok_per_s", "theirs_tok_per_s", "ours_over_theirs", "same_first_token"}),
    "paging": (6, {"measure", "case", "of_resident", "of_quiet", "copies_per_request", "itl_p95_ms"}),
    "server_load": (4, {"popularity", "tok_per_s", "of_base", "ttft_p95_ms", "tpot_p50_ms"}),
    "fairness": (5, {"case", "ttft_p50_ms", "ttft_p95_ms", "p95_of_share", "jain", "others_answered", "refused"}),
    "structured_output": (2, {"batch", "tok_per_s", "of_free", "decode_of_free", "compile_p50_ms"}),
    "activated_lora": (3, {"case", "cached", "ttft_ms", "of_base", "ordinary_over_it"}),
    "versus_vllm": (3, {"load", "busy", "unit", "ours", "theirs", "times_as_fast", "ours_ttft_ms", "theirs_token_ms"}),
    "versus_llama_server": (3, {"load", "busy", "unit", "ours", "theirs", "times_as_fast", "peer", "peer_setting"}),
    "prompt_lookup": (5, {"case", "ratio", "same_tokens", "steps", "steps_without", "guessed", "right"}),
    "tenant_text": (7, {"case", "ratio", "same_tokens", "steps", "steps_without", "drafted", "right"}),
    "soak": (5, {"hours", "rss_mb", "anon_mb", "num_files", "kv_usage", "waiting", "quiet_ttft_p95_ms", "num_faults"}),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where results go; bases and stores are made anew in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_BENCH_CACHE", str(tmp_path_factory.mktemp("bench-cache")))
        yield tmp_path_factory.mktemp("results")


def run_quick(name: str, out: Path) -> list[dict[str, str]]:
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(out)])
    with (out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", [*NAMES, "soak"])
def test_quick_form_runs_and_writes_csv_and_plot(name: str, out: Path) -> None:
    native = native_ops(torch.bfloat16)
    if name in ("op_linear", "op_nf4") and (native is None or not native.linear_max_rows):
        pytest.skip("this machine has nothing to compare")
    rows = run_quick(name, out)
    count, columns = EXPECTED[name]
    assert len(rows) == count
    assert columns | MACHINE_COLUMNS <= rows[0].keys()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name in CHECKS:
        CHECKS[name](rows)


def test_one_process_and_two_ranks_are_timed_side_by_side(out: Path) -> None:
    model_tax.main(["--quick", "--tensor-parallel", "2", "--out", str(out)])
    with (out / "model_tax_ranks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows][-2:] == ["a prompt, base", "a prompt, one adapter"]
    assert len(rows) == 7
    for row in rows:
        assert (row["times_base_one"], row["times_base_ranks"]) == ("1", "1") or "base" not in row["case"]
        assert float(row["ms_one"]) > 0
        assert float(row["ms_ranks"]) > 0


def test_a_soak_that_is_told_to_end_concludes_with_what_it_has_seen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes when it has printed as many rows as it needs."""
    rows, say = list[str](), Report.say

    def say_and_end(report: Report, text: str) -> None:
        say(report, text)
        if " kv_usage " in text:
            rows.append(text)
            if len(rows) == FEWEST_ROWS:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "say", say_and_end)
    soak.main(["--quick", "--hours", "0.02", "--load", "0.5", "--out", str(out / "ended")])
    assert FEWEST_ROWS <= len(rows) < 100, "it went on"
    assert (out / "ended" / "soak.png").exists()


def all_implementations_are_exact(rows: list[dict[str, str]]) -> None:
    errors = {(row["implementation"], row["max_error"]) for row in rows if float(row["max_error"]) > 0.01}
    assert not errors, "a benchmark of something that computes something else"


def bases_are_their_own_reference(rows: list[dict[str, str]]) -> None:
    assert [row["of_base"] for row in rows if row["adapters"] == "0"] == ["1", "1"]
    assert all(float(row["tok_per_s"]) > 0 for row in rows)


def both_sides_answer_alike(rows: list[dict[str, str]]) -> None:
    assert all(float(row["same_first_token"]) > 0.8 for row in rows)


def adapters_were_paged_and_loaded(rows: list[dict[str, str]]) -> None:
    by_case = {(row["measure"], row["case"]): row for row in rows}
    assert float(by_case["throughput", "paged"]["copies_per_request"]) > 0.1
    assert int(by_case["inter-token latency", "cold"]["num_loads"]) == 6
    assert int(by_case["inter-token latency", "quiet"]["num_loads"]) == 0


def every_popularity_was_answered(rows: list[dict[str, str]]) -> None:
    assert [row["popularity"] for row in rows] == ["base", "identical", "distinct", "zipf"]
    assert all(int(row["requests"]) > 0 for row in rows)


def only_ordinary_lora_computes_the_conversation_again(rows: list[dict[str, str]]) -> None:
    assert {row["case"]: int(row["cached"]) for row in rows} == {"base": 192, "activated": 192, "ordinary": 0}


def one_server_is_both_sides(rows: list[dict[str, str]]) -> None:
    assert [row["unit"] for row in rows] == ["tok/s", "tok/s", "ms"]
    assert {row["peer"] for row in rows} == {"multilora"}


def guesses_saved_forwards_and_changed_no_token(rows: list[dict[str, str]]) -> None:
    assert all(row["same_tokens"] == "True" for row in rows)
    by_case = {row["case"]: row for row in rows}
    assert float(by_case["repeats"]["steps"]) < float(by_case["repeats"]["steps_without"]) / 2
    assert float(by_case["32 requests repeat"]["guessed"]) == 0


def earlier_answers_saved_forwards_and_changed_no_token(rows: list[dict[str, str]]) -> None:
    assert all(row["same_tokens"] == "True" for row in rows)
    assert all(float(row["steps"]) < 0.95 * float(row["steps_without"]) for row in rows if "hot" not in row["case"])


def everything_happened_and_nothing_failed(rows: list[dict[str, str]]) -> None:
    last = rows[-1]
    assert int(last["num_faults"]) == 0
    assert all(int(last[name]) > 0 for name in ("answered", "tokens", "changes")), last
    assert float(last["evictions"]) > 0


CHECKS: dict[str, Callable[[list[dict[str, str]]], None]] = {
    "op_lora": all_implementations_are_exact,
    "model_tax": bases_are_their_own_reference,
    "versus_peft": both_sides_answer_alike,
    "paging": adapters_were_paged_and_loaded,
    "server_load": every_popularity_was_answered,
    "prompt_lookup": guesses_saved_forwards_and_changed_no_token,
    "tenant_text": earlier_answers_saved_forwards_and_changed_no_token,
    "activated_lora": only_ordinary_lora_computes_the_conversation_again,
    "versus_vllm": one_server_is_both_sides,
    "versus_llama_server": one_server_is_both_sides,
    "soak": everything_happened_and_nothing_failed,
}

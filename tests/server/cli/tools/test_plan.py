"""`multilora plan`: the planner's figures on the screen and as JSON, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.spec import TrainSpec

Command = Callable[..., Any]


def test_train_shows_every_part_and_every_assumption(run: Command) -> None:
    shown = run("plan", "train", "--model", "7B", "--method", "full", "--optimizer-state", "bf16").stdout
    for part in ("trained weights", "gradients", "optimizer", "activations", "at the peak"):
        assert part in shown
    for assumed in ("exactly 7,000,000,000 parameters", "= 12 bytes per trained parameter", "rough on-demand rates"):
        assert assumed in shown
    assert "12.0 bytes per parameter of the base" in shown


def test_train_answers_programs_in_bytes(run_json: Command) -> None:
    told = run_json(
        "plan", "train", "-m", "7B", "--method", "full", "--optimizer-state", "bf16", "--zero", "3", "--devices", 8
    )
    assert told["state_bytes"] == 10_500_000_000
    assert sum(line["bytes"] for line in told["lines"]) == told["total_bytes"]
    assert told["hardware"][0]["usd"] <= told["hardware"][-1]["usd"]


def test_train_shows_one_row_a_device_at_your_price(run: Command, run_json: Command) -> None:
    question = ("plan", "train", "-m", "llama-3.1-8b", "--checkpointing", "--gpu", "h100", "--usd-per-hour", "2")
    shown = run(*question).stdout
    assert "1 x h100" in shown
    assert "2 x h100" not in shown
    for option in run_json(*question)["hardware"]:
        assert option["usd"] == pytest.approx(2 * option["devices"] * option["hours"])


def test_train_says_where_nothing_holds_it(run: Command) -> None:
    shown = run("plan", "train", "-m", "llama-3.1-405b", "--method", "full", "--gpu", "l4").stdout
    assert "this run fits none of these devices" in shown


def test_train_reads_a_base_on_disk(run_json: Command, base: Path) -> None:
    told = run_json("plan", "train", "-m", base, "--rank", 4)
    assert told["model"] == "tiny"
    assert told["trained_parameters"] > 0


def test_serve_shows_the_known_example(run: Command, run_json: Command) -> None:
    question = ("plan", "serve", "-m", "13B", "--device-gb", 80, "--reserve-gb", 20, "--adapter-mb", 25)
    assert "adapters resident at once  1,360" in run(*question).stdout
    assert run_json(*question)["adapters_on_device"] == 1360
    assert run_json(*question, "--nf4")["adapters_on_device"] == 2112


def test_recommend_gives_reasons_and_a_spec_the_trainer_takes(run: Command, run_json: Command) -> None:
    question = ("plan", "recommend", "-m", "llama-3.1-8b", "--examples", 20000, "--task", "knowledge", "--variants", 40)
    told = run_json(*question)
    assert any("40 of them share one base" in reason for reason in told["reasons"])
    spec = TrainSpec.from_mapping({"base": "b", "data": "d", **told["spec"]})
    assert spec.adapter.rank == 16
    shown = run(*question).stdout
    assert "method: lora" in shown
    assert "bits stored a trained parameter" in shown


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("train", "-m", "nope"), "'nope' is no folder, no count"),
        (("train", "-m", "7B", "--optimizer-state", "int3"), "optimizer_state must be one of trainer, zero"),
        (("train", "-m", "7B", "--usd-per-hour", 2), "name it with --gpu"),
        (("serve", "-m", "llama-3.1-70b"), "--nf4 brings the base to 39.5 GB"),
        (("serve", "-m", "7B", "--gpu", "abacus"), "gpu must be one of l4"),
        (("recommend", "-m", "7B", "--examples", 9, "--task", "magic"), "task must be one of style"),
    ],
)
def test_refusals_are_one_line_with_exit_code_4(
    run: Command, run_json: Command, question: tuple[Any, ...], message: str
) -> None:
    result = run("plan", *question)
    assert result.exit_code == 4
    assert result.stderr.startswith("bad_plan: ")
    assert message in result.stderr
    assert run_json("plan", *question)["error"]["code"] == "bad_plan"


def test_the_old_spelling_of_an_option_works_and_warns(run: Command) -> None:
    new, old = (run("plan", "train", "-m", "7B", option, "bf16") for option in ("--optimizer-state", "--keeping"))
    assert (old.exit_code, old.stdout) == (0, new.stdout)
    assert old.stderr.startswith("--keeping is now --optimizer-state;")
    assert "--keeping" not in run("plan", "train", "--help").stdout


@pytest.mark.parametrize("option", ["--device-gb", "--reserve-gb", "--adapter-mb", "--host-gb"])
def test_a_size_without_end_is_refused(run: Command, option: str) -> None:
    refused = run("plan", "serve", "-m", "7B", option, "inf")
    assert refused.exit_code == 2
    assert "must be a finite number, got inf" in refused.stderr

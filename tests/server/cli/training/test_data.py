"""`multilora data check`: what a file holds and what would be refused, before anything is queued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

from server.cli.common.output import Output
from server.cli.training.data import readable
from trainer.data.jsonl import read_jsonl

Command = Callable[..., Result]


def alpaca(path: Path, count: int = 12) -> Path:
    path.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(count)]))
    return path


def test_a_file_is_recognised_and_written_as_a_run_reads_it(run: Command, tmp_path: Path) -> None:
    file, out = alpaca(tmp_path / "alpaca.json"), tmp_path / "out.jsonl"
    done = run("data", "check", file, "--write", out, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["container"], report["shapes"], report["usable"]) == ("JSON list", {"Alpaca": 12}, True)
    assert read_jsonl(out).num_examples == 12
    again = run("data", "check", file, "--write", out)
    assert again.exit_code == 5
    assert "exists" in again.output


def test_refused_lines_are_shown_and_end_the_check(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"text": "a"}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    done = run("data", "check", file)
    assert done.exit_code == 4
    assert "1 of 2 lines are preference pairs" in done.output
    assert "data_refused" in done.output


def test_columns_are_mapped_by_name_and_wrong_ones_are_refused(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text("frage,antwort\n" + "".join(f"Was ist {n}?,{n}\n" for n in range(10)))
    assert run("data", "check", file).exit_code == 4
    done = run("data", "check", file, "--map", "user=frage,assistant=antwort", "--json")
    assert json.loads(done.stdout)["num_examples"] == 10
    for wrong in ("user=frage", "answer=antwort"):
        assert "bad_option" in run("data", "check", file, "--map", wrong).output


def test_onboard_reads_a_file_as_it_is_or_a_copy_that_is_gone_afterwards(tmp_path: Path) -> None:
    file = alpaca(tmp_path / "alpaca.json")
    with readable(file, "", Output()) as copy:
        assert copy != file
        with readable(copy, "", Output()) as same:
            assert same == copy
        assert read_jsonl(copy).num_examples == 12
    assert not copy.exists()

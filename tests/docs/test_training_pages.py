"""docs/data.md and docs/training.md: every line, row and spec that they show is read as they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.trainers.training import demo_spec
from trainer.data.formats.convert import columns_of, convert
from trainer.run import train
from trainer.run_folder.folder import Exit
from trainer.spec import TrainSpec

DOCS = Path(__file__).parents[2] / "docs"
DATA, TRAINING = (DOCS / "data.md").read_text(), (DOCS / "training.md").read_text()
USER, ASSISTANT = '{"role": "user", "content": "Rain?"}', '{"role": "assistant", "content": "No."}'
LINES = [line for block in re.findall(r"```\n(.*?)```", DATA, re.S) for line in block.splitlines()]
ROWS = re.findall(r"^\| ([^|`]+) \| `(\{.*?\})`", DATA, re.M)
FILLED = {  # what stands for the dots
    '"prompt": [messages], "completion": [messages]': f'"prompt": [{USER}], "completion": [{ASSISTANT}]',
    '"messages": [...]': f'"messages": [{USER}]',
    '"tools": [...]': '"tools": []',
    '"preferred_output": [...]': f'"preferred_output": [{ASSISTANT}]',
    '"non_preferred_output": [...]': f'"non_preferred_output": [{USER.replace("user", "assistant")}]',
    ": ...": ': "one"',
}
METHODS = re.findall(r"^\| `(\w+)` \| [^|]+ \| `(\{.*?\})` \|$", TRAINING, re.M)


def read(text: str, tmp_path: Path, columns: str | None = None) -> int:
    """The examples in a file of this one line."""
    (tmp_path / "source.jsonl").write_text(json.dumps(json.loads(text)) + "\n")
    named = columns_of(columns) if columns else None
    return convert(tmp_path / "source.jsonl", tmp_path / "target.jsonl", columns=named).num_examples


@pytest.mark.parametrize("line", LINES)
def test_every_line_that_is_shown_is_an_example(line: str, tmp_path: Path) -> None:
    assert read(line, tmp_path) == 1


@pytest.mark.parametrize(("name", "body"), ROWS)
def test_every_row_of_files_is_read(name: str, body: str, tmp_path: Path) -> None:
    for dots, text in FILLED.items():
        body = body.replace(dots, text)
    (columns,) = re.findall(r"--map (\S+?)`", DATA) if "frage" in body else [None]
    assert read(body, tmp_path, columns) == 1


def test_the_pages_show_lines_rows_and_a_spec() -> None:
    assert len(LINES) == 6
    assert {"Alpaca", "Dolly", "GSM8K and its kind", "ShareGPT", "TRL, conversational"} <= {name for name, _ in ROWS}
    assert "\n\n| pairs" not in DATA, "a table ends at an empty line"


def test_the_spec_that_is_shown_is_one_and_names_what_it_may_hold(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TRAINING, re.S)
    (tmp_path / "spec.yaml").write_text(text)
    spec = TrainSpec.from_yaml(tmp_path / "spec.yaml")
    methods = re.search(r"method: lora +# (.*?);", text)
    assert methods is not None
    for method in ("lora", "qlora", "dora", "full", "dpo"):
        assert method in text
        plain = {"base": spec.base, "data": spec.data, "method": method}
        assert TrainSpec.from_mapping(plain).objective == ("dpo" if method == "dpo" else "supervised")


@pytest.mark.parametrize(("method", "line"), METHODS)
def test_every_method_trains_from_such_a_file_as_its_row_shows(method: str, line: str, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    lines = [line.replace("repairs", f"repairs of house {number}") for number in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert train(demo_spec(tmp_path, method=method, optim={"max_steps": 1}), tmp_path / "run") is Exit.SUCCEEDED


def test_the_page_shows_a_file_of_each_method() -> None:
    assert [method for method, _ in METHODS] == ["lora", "qlora", "dora", "full", "dpo"]

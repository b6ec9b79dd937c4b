"""Held-out calls, asked again over the engine's own forward, with an adapter that was never shown a tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.demo.assets import demo_adapters, demo_base_path
from server.engine.model.base_model import BaseModel, load_base
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.calls import measure_calls
from server.jobs.gate.serving_scorer import ScorerSettings, ServingScorer, pack_folder
from support.trainers.tool_data import NOW, call, calling, line
from support.trainers.training_data import demo_tokenizer, write_jsonl
from trainer.data.encode import Encoder
from trainer.data.jsonl import read_jsonl
from trainer.gate.answers.calls import CallScores

DIALECT = "hermes"
WITH_CALLS = [line(f"What time is it, {name}?", calling(call("now", {})), tools=[NOW]) for name in "abcde"]
WITH_TEXT = [
    line(f"Tell me a joke, {name}.", {"role": "assistant", "content": "No."}, tools=[NOW]) for name in "abcdefg"
]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(demo_base_path(), dtype="float32")


def measured(base: BaseModel, lines: list[dict[str, Any]], folder: Path) -> CallScores | None:
    path = write_jsonl(folder / "lines.jsonl", lines)
    tokenizer = Tokenizer.load(demo_base_path())
    settings = ScorerSettings(max_tokens=768, vocabulary=tokenizer.vocabulary(base.num_embeddings))
    scorer = ServingScorer(base, pack_folder(demo_adapters()["med"], base), settings)
    encoder = Encoder(demo_tokenizer(), max_sequence_length=512, tool_dialect=DIALECT)
    records = read_jsonl(path).records()
    examples = [
        example for number, digest, record in records for example in encoder.encode(record, line=number, digest=digest)
    ]
    return measure_calls(scorer, tokenizer, path, examples, DIALECT)


def test_an_adapter_that_never_calls_is_right_where_the_data_does_not_call(base: BaseModel, tmp_path: Path) -> None:
    found = measured(base, [*WITH_CALLS, *WITH_TEXT], tmp_path)
    assert found is not None
    assert found.num_answers == 12
    assert found.valid * 12 >= 7
    assert found.named == found.equal <= 7 / 12
    assert found.named > 0


def test_tools_that_the_server_does_not_take_are_named(base: BaseModel, tmp_path: Path) -> None:
    odd: Any = {"type": "function", "function": {"name": "now", "parameters": {"not": {}}}}
    found = measured(base, [{**each, "tools": [odd]} for each in [*WITH_CALLS, *WITH_TEXT]], tmp_path)
    assert found is not None
    assert "not" in found.refused


def test_lines_without_tools_are_not_asked(base: BaseModel, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"Hi {n}"}, WITH_TEXT[0]["messages"][1]]} for n in range(10)]
    assert measured(base, lines, tmp_path) is None

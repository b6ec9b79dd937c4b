"""Files as people bring them: recognised, converted without a loss of meaning, or refused by line and by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.formats.convert import check_file, columns_of, convert
from trainer.data.formats.sources import SourceLimits
from trainer.data.jsonl import read_jsonl
from trainer.data.problems import DataRejected

Body = dict[str, Any]
QUESTION, ANSWER = "Who pays for repairs?", "The tenant."
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
CHAT = {"messages": [USER, ASSISTANT]}

ASK = {"name": "ask", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLED = [
    TURNS[0],
    {"from": "function_call", "value": '{"name": "ask", "arguments": {"city": "Oslo"}}'},
    {"from": "observation", "value": "The tenant pays."},
    TURNS[1],
]


def lines(bodies: list[Body]) -> bytes:
    return "".join(json.dumps(body, ensure_ascii=False) + "\n" for body in bodies).encode()


def converted(tmp_path: Path, data: bytes, **options: Any) -> tuple[list[Body], Any]:
    source, target = tmp_path / "source", tmp_path / "target.jsonl"
    source.write_bytes(data)
    report = convert(source, target, **options)
    bodies = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(bodies) == report.num_examples
    return bodies, report


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, "Alpaca", [USER, ASSISTANT]),
        (
            {
                "instruction": "Translate.",
                "input": "Miete",
                "output": "rent",
                "system": "Be brief.",
                "text": "all of it",
            },
            "Alpaca",
            [SYSTEM, {"role": "user", "content": "Translate.\n\nMiete"}, {"role": "assistant", "content": "rent"}],
        ),
        (
            {"instruction": "And then?", "input": "", "output": "No.", "history": [[QUESTION, ANSWER]]},
            "Alpaca",
            [USER, ASSISTANT, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "No."}],
        ),
        (
            {"instruction": "Sum up.", "context": "A lease.", "response": "Lease.", "category": "summarization"},
            "Dolly",
            [{"role": "user", "content": "Sum up.\n\nA lease."}, {"role": "assistant", "content": "Lease."}],
        ),
        ({"question": QUESTION, "answer": ANSWER}, "question and answer", [USER, ASSISTANT]),
        ({"prompt": QUESTION, "response": ANSWER}, "prompt and response", [USER, ASSISTANT]),
        ({"input": QUESTION, "output": ANSWER, "id": 7}, "input and output", [USER, ASSISTANT]),
        ({"problem": QUESTION, "solution": ANSWER}, "problem and solution", [USER, ASSISTANT]),
        ({"conversations": TURNS}, "ShareGPT", [USER, ASSISTANT]),
        ({"conversations": TURNS, "system": "Be brief."}, "ShareGPT", [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [USER, ASSISTANT]}, "ShareGPT", [USER, ASSISTANT]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}, "ShareGPT", [SYSTEM, USER, ASSISTANT]),
        ({"messages": [{**SYSTEM, "role": "developer"}, USER, ASSISTANT]}, "messages", [SYSTEM, USER, ASSISTANT]),
        ({"messages": [{**SYSTEM, "content": ""}, USER, ASSISTANT]}, "messages", [USER, ASSISTANT]),
        ({"messages": [{**USER, "name": "Ada"}, ASSISTANT], "metadata": {"a": "b"}}, "messages", [USER, ASSISTANT]),
        ({"messages": [USER, {**ASSISTANT, "refusal": None, "tool_calls": None}]}, "messages", [USER, ASSISTANT]),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages", [USER, {**ASSISTANT, "weight": 0.5}]),
        ({"messages": [USER, {**ASSISTANT, "loss_weight": 1.0}]}, "messages", [USER, {**ASSISTANT, "weight": 1.0}]),
        ({"messages": [USER, ASSISTANT, USER]}, "messages", [USER, ASSISTANT]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": QUESTION}]}, ASSISTANT]},
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, ASSISTANT],
        ),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            "conversational prompt and completion",
            [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT],
        ),
    ],
)
def test_what_people_bring_becomes_messages(tmp_path: Path, body: Body, shape: str, expected: list[Body]) -> None:
    bodies, report = converted(tmp_path, lines([body]))
    assert bodies == [{"messages": expected}]
    assert dict(report.shapes) == {shape: 1}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (CHAT, CHAT),
        ({"prompt": QUESTION, "completion": ANSWER, "id": 1}, {"prompt": QUESTION, "completion": ANSWER}),
        ({"text": ANSWER, "source": "web"}, {"text": ANSWER}),
    ],
)
def test_our_own_forms_stay_as_they_are_and_what_says_nothing_is_left_out_with_a_note(
    tmp_path: Path, body: Body, kept: Body
) -> None:
    bodies, report = converted(tmp_path, lines([body]))
    assert bodies == [kept]
    assert sum(report.notes.values()) == len(body.keys() - kept.keys())


WORSE = {"role": "assistant", "content": "Nobody."}
PAIR = {"chosen": [ASSISTANT], "rejected": [WORSE]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": QUESTION, "chosen": ANSWER, "rejected": "Nobody."}, None),
        ({"prompt": [SYSTEM, USER], **PAIR, "score_chosen": 8.0}, {"prompt": [SYSTEM, USER], **PAIR}),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, {"prompt": [USER], **PAIR}),
        ({"prompt": QUESTION, "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, {"prompt": [USER], **PAIR}),
        ({"prompt": QUESTION, **PAIR}, {"prompt": [USER], **PAIR}),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [WORSE]},
            {"prompt": [USER], **PAIR},
        ),
        (
            {
                "conversations": TURNS[:1],
                "system": "Be brief.",
                "chosen": TURNS[1],
                "rejected": {"from": "gpt", "value": "Nobody."},
            },
            {"prompt": [SYSTEM, USER], **PAIR},
        ),
        (
            {"instruction": QUESTION, "input": "", "chosen": ANSWER, "rejected": "Nobody."},
            {"prompt": [USER], **PAIR},
        ),
    ],
    ids=["texts", "messages", "whole chats", "both", "prompt as text", "OpenAI", "LLaMA-Factory", "Alpaca"],
)
def test_preference_pairs_of_every_form_become_one_form(tmp_path: Path, body: Body, expected: Body | None) -> None:
    bodies, report = converted(tmp_path, lines([body]))
    assert bodies == [expected or body]
    assert all(shape.startswith("preference pairs") for shape in report.shapes)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": QUESTION, "completion": ANSWER, "label": True}, "preference_data"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "wrong_type"),
        ({"chosen": ANSWER, "rejected": "No."}, "missing_key"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "nothing_supervised"),
        ({"question": QUESTION, "answer": ANSWER, "context": "A lease."}, "unknown_key"),
        ({"text": QUESTION, "label": 1}, "unknown_key"),
        ({"instruction": QUESTION, "output": ANSWER, "images": ["a.png"]}, "unknown_key"),
        ({"a": QUESTION, "b": ANSWER}, "unknown_format"),
        ({"question": QUESTION, "answer": ["a", "b"]}, "wrong_type"),
        ({"messages": [USER, {**ASSISTANT, "wieght": 0}]}, "unknown_key"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "wrong_role"),
        ({"messages": [{**SYSTEM, "role": "tool"}, USER, ASSISTANT]}, None),
        ({"conversations": [*TURNS, {"from": "function_call", "value": "{}"}]}, "bad_tool_call"),
        ({"conversations": [*CALLED[:2], CALLED[2], CALLED[2], CALLED[3]], "tools": [ASK]}, "unsupported_tools"),
        ({"conversations": CALLED}, "bad_tool_call"),
        ({"conversations": CALLED, "tools": "[{"}, "wrong_type"),
        ({"conversations": [SYSTEM, USER, ASSISTANT], "system": "Be long."}, "wrong_type"),
        ({"question": QUESTION, "answer": " "}, "empty_content"),
        ({"question": QUESTION, "answer": ANSWER, "history": 5}, "wrong_type"),
    ],
)
def test_what_would_lose_its_meaning_is_refused_with_its_line(tmp_path: Path, body: Body, code: str | None) -> None:
    with pytest.raises(DataRejected) as refused:
        converted(tmp_path, lines([CHAT, body]))
    assert refused.value.line == 2
    assert code in (None, refused.value.code)


@pytest.mark.parametrize("tools", [[ASK], json.dumps([ASK]), [{"type": "function", "function": ASK}]])
@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_function_calls_of_sharegpt_become_tool_calls(tmp_path: Path, tools: Any, arguments: Any) -> None:
    """As LLaMA-Factory writes them: calls and tools as JSON texts."""
    turns = [*CALLED[:1], {"from": "function_call", "value": json.dumps({"name": "ask", "arguments": arguments})}]
    bodies, report = converted(tmp_path, lines([{"conversations": [*turns, *CALLED[2:]], "tools": tools}]))
    call = {"id": "call-1-0", "type": "function", "function": {"name": "ask", "arguments": '{"city": "Oslo"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1-0", "content": "The tenant pays."},
        ASSISTANT,
    ]
    assert bodies == [{"tools": [{"type": "function", "function": ASK}], "messages": messages}]
    assert dict(report.shapes) == {"ShareGPT": 1}


def test_two_calls_at_once_are_one_message_and_their_one_result_is_refused(tmp_path: Path) -> None:
    two = {"from": "function_call", "value": json.dumps([{"name": "ask", "arguments": {}}] * 2)}
    bodies, _ = converted(tmp_path, lines([{"conversations": [CALLED[0], two], "tools": [ASK]}]))
    assert [call["id"] for call in bodies[0]["messages"][1]["tool_calls"]] == ["call-1-0", "call-1-1"]
    with pytest.raises(DataRejected, match="one result for 2 calls"):
        converted(tmp_path, lines([{"conversations": [CALLED[0], two, *CALLED[2:]], "tools": [ASK]}]))


def test_tools_in_openais_form_stay_whole_beside_what_is_left_out(tmp_path: Path) -> None:
    """Their schemas nest deeper than other lines may."""
    nested: Body = {"type": "string"}
    for _ in range(4):
        nested = {"type": "object", "properties": {"a": nested}}
    tool = {"type": "function", "function": {"name": "ask", "parameters": nested}}
    call = {"id": "c1", "type": "function", "function": {"name": "ask", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    bodies, report = converted(tmp_path, lines([{"messages": messages, "tools": [tool], "id": 1}]))
    assert bodies == [{"messages": messages, "tools": [tool]}]
    assert dict(report.notes) == {"key 'id' left out": 1}


def alpaca(count: int = 3) -> list[Body]:
    return [{"instruction": f"Say {n}, or ü.", "input": "", "output": f'"{n}",\nyes'} for n in range(count)]


def as_csv(bodies: list[Body], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(bodies[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(bodies)
    return text.getvalue().encode()


CONTAINERS: dict[str, tuple[str, Callable[[list[Body]], bytes]]] = {
    "lines": ("JSON lines", lines),
    "windows": ("JSON lines", lambda bodies: b"\xef\xbb\xbf" + lines(bodies).replace(b"\n", b"\r\n")),
    "list": ("JSON list", lambda bodies: json.dumps(bodies).encode()),
    "pretty": (
        "JSON list",
        lambda bodies: b"\xef\xbb\xbf\n" + json.dumps(bodies, indent=2, ensure_ascii=False).encode(),
    ),
    "csv": ("CSV", as_csv),
    "excel": ("CSV", lambda bodies: b"\xef\xbb\xbf" + as_csv(bodies, ";")),
    "tsv": ("TSV", lambda bodies: as_csv(bodies, "\t")),
    "gzip": ("JSON lines (gzip)", lambda bodies: gzip.compress(lines(bodies))),
    "gzip list": ("JSON list (gzip)", lambda bodies: gzip.compress(json.dumps(bodies).encode())),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    name, write = CONTAINERS[kind]
    bodies, report = converted(tmp_path, write(alpaca()))
    assert report.container == name
    assert [body["messages"][0]["content"] for body in bodies] == [each["instruction"] for each in alpaca()]
    assert [body["messages"][1]["content"] for body in bodies] == [each["output"] for each in alpaca()]


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list([{**CHAT, "id": n} for n in range(3)]).to_parquet(path)
    bodies, report = converted(tmp_path, path.read_bytes())
    assert bodies == [CHAT] * 3
    assert (report.container, report.num_duplicates) == ("Parquet", 2)
    with pytest.raises(DataRejected, match="Parquet, which the server does not open"):
        converted(tmp_path, path.read_bytes(), sources=SourceLimits(parquet=False))


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"PK\x03\x04zip", "unsupported_file", "zip or Excel"),
        ("ü".encode("utf-16"), "not_utf8", "UTF-16"),
        (b"just a text\nof two lines", "unsupported_file", "no format is recognised"),
        (b"PAR1 and nothing more", "unsupported_file", "Parquet file is damaged"),
        (gzip.compress(lines([CHAT] * 400), mtime=0)[:60], "unsupported_file", "gzip file is damaged"),
        (b'[{"text": "a"}, {"text": ', "bad_json", "element 2"),
        (b'[{"text": "a"}] {"text": "b"}', "bad_json", "follows the end"),
        (b"question,answer\na,b,c\n", "bad_table", "3 cells"),
        (b"question,question\na,b\n", "bad_table", "repeated name"),
        (b"question,answer\n\xff,b\n", "not_utf8", "not UTF-8"),
        (b"", "too_few_examples", "no example"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, data: bytes, code: str, words: str) -> None:
    with pytest.raises(DataRejected, match=words) as refused:
        converted(tmp_path, data)
    assert refused.value.code == code


def test_a_file_that_unpacks_for_ever_is_refused_before_it_has(tmp_path: Path) -> None:
    bomb = gzip.compress(lines([{"text": "a" * 1000}] * 2000))
    with pytest.raises(DataRejected) as refused:
        converted(tmp_path, bomb, sources=SourceLimits(max_bytes=100_000))
    assert refused.value.code == "file_too_large"


def test_a_list_longer_than_what_is_read_at_once_comes_whole(tmp_path: Path) -> None:
    bodies = [{"text": f'{n} [{{,]}} \\ " ' + "x" * (n % 700)} for n in range(1500)]
    for data in (json.dumps(bodies), json.dumps(bodies, indent=1)):
        assert converted(tmp_path, data.encode())[0] == bodies


def test_columns_of_any_name_are_taken_when_they_are_named(tmp_path: Path) -> None:
    data = as_csv([{"frage": QUESTION, "antwort": ANSWER, "nr": 1}])
    with pytest.raises(DataRejected, match=r"--map user=\.\.\.,assistant=\.\.\."):
        converted(tmp_path, data)
    bodies, _ = converted(tmp_path, data, columns=columns_of("user=frage,assistant=antwort"))
    assert bodies == [CHAT]
    for wrong in ("user=frage", "user=a,user=b,assistant=c", "answer=a", "user"):
        with pytest.raises(ValueError, match="user"):
            columns_of(wrong)


def test_a_check_counts_all_that_is_refused_and_a_converted_file_is_what_the_trainer_reads(tmp_path: Path) -> None:
    path, target = tmp_path / "mixed.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(
        lines([*alpaca(12), {"conversations": TURNS}, {"prompt": "a", "completion": "b", "label": 1}, {"x": "y"}])
    )
    report = check_file(path, target=target)
    assert dict(report.shapes) == {"Alpaca": 12, "ShareGPT": 1}
    assert report.counts == {"preference_data": 1, "unknown_format": 1}
    assert [problem.line for problem in report.problems] == [14, 15]
    assert read_jsonl(target).num_examples == 13
    assert "Alpaca (12)" in report.text
    assert report.to_mapping()["num_refused"] == 2


@pytest.mark.parametrize(
    ("data", "line", "code"),
    [
        (b"\n\nquestion,answer\na,b\nc\n", 5, "bad_table"),
        (b"\n\nquestion,answer\na,\xff\n", 4, "not_utf8"),
        (b"question,answer\na,b\nc,caf\xc3", 3, "not_utf8"),
        (b'[{"question": "a", "answer": "b"}]\n\xc3', 2, "not_utf8"),
    ],
)
def test_a_fault_of_a_table_is_at_its_line_also_behind_blank_ones(
    tmp_path: Path, data: bytes, line: int, code: str
) -> None:
    with pytest.raises(DataRejected) as refused:
        converted(tmp_path, data)
    assert (refused.value.line, refused.value.code) == (line, code)

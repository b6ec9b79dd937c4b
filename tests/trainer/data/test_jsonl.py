"""A training file is read exactly or refused with line, code and excerpt; nothing a stranger writes crashes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.trainers.training_data import chat, chats, write_jsonl
from trainer.data.formats.convert import convert
from trainer.data.jsonl import DataLimits, read_jsonl
from trainer.data.problems import DataRejected, LineRefused
from trainer.data.records import parse_record

GOOD = json.dumps(chat("Who pays?", "The tenant.")).encode()
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def messages(*items: object) -> bytes:
    return json.dumps({"messages": list(items)}).encode()


BAD_LINES: dict[str, list[bytes]] = {
    "not_utf8": [b'{"text": "\xff\xfe"}', b"\x00\xff"],
    "bad_json": [b"{", b'{"text": "a"} x', b"text", b'\xef\xbb\xbf{"text": "a"}', b'{"text": "\x01"}'],
    "duplicate_key": [b'{"text": "a", "text": "b"}', b'{"messages": [{"role": "user", "role": "user"}]}'],
    "nan_literal": [b'{"text": NaN}', b'{"messages": [{"role": "assistant", "content": "a", "weight": -Infinity}]}'],
    "too_deep": [b"[" * 50 + b"]" * 50, b'{"text":' * 20 + b"1" + b"}" * 20, b"[" * 100_000],
    "not_an_object": [b"[]", b'"text"', b"1", b"null"],
    "unknown_key": [
        b'{"text": "a", "label": 1}',
        b'{"prompt": "a", "completion": "b", "system": "c"}',
        b'{"instruction": "a"}',
        messages(USER, {**ANSWER, "name": "x"}),
    ],
    "missing_key": [b"{}", b'{"prompt": "a"}', b'{"completion": "a"}', messages({"role": "user"}, ANSWER)],
    "wrong_type": [b'{"text": 1}', b'{"text": null}', b'{"messages": {}}', messages(USER, "a"), b'{"messages": 3}'],
    "empty_content": [
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"prompt": "a", "completion": ""}',
        messages(USER, {"role": "assistant", "content": ""}),
        messages(USER, {"role": "assistant", "content": []}),
    ],
    "not_unicode": [b'{"text": "a\\ud800b"}', b'{"prompt": "\\udfff", "completion": "b"}'],
    "wrong_role": [
        messages({"role": "bot", "content": "a"}, ANSWER),
        messages({"content": "a"}, ANSWER),
        messages({"role": ["user"], "content": "a"}, ANSWER),
        messages(USER, {"role": "system", "content": "a"}, ANSWER),
        messages(ANSWER),
        messages({"role": "system", "content": "a"}, ANSWER),
        messages(USER, ANSWER, USER),
    ],
    "no_assistant": [messages(USER), messages()],
    "nothing_supervised": [messages(USER, {**ANSWER, "weight": 0})],
    "bad_weight": [
        messages(USER, {**ANSWER, "weight": 2}),
        messages(USER, {**ANSWER, "weight": -0.1}),
        messages(USER, {**ANSWER, "weight": True}),
        messages(USER, {**ANSWER, "weight": "1"}),
        messages({**USER, "weight": 0}, ANSWER),
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e999}]}',
    ],
    "unsupported_content": [
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        messages({"role": "user", "content": ["a"]}, ANSWER),
    ],
    "unsupported_tools": [
        json.dumps({"messages": [USER, ANSWER], "functions": []}).encode(),
        messages(USER, {"role": "assistant", "content": None, "function_call": {}}),
        messages(USER, ANSWER, {"role": "function", "content": "a"}, ANSWER),
    ],
    "line_too_long": [b'{"text": "' + b"a" * 5000 + b'"}'],
}


@pytest.mark.parametrize(("code", "line"), [(code, line) for code, lines in BAD_LINES.items() for line in lines])
def test_a_bad_line_is_refused_with_its_number_and_code(tmp_path: Path, code: str, line: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]))
    limit = 4096 if code == "line_too_long" else DataLimits().max_line_bytes
    with pytest.raises(DataRejected) as refused:
        read_jsonl(path, DataLimits(min_examples=1, max_line_bytes=limit))
    error = refused.value
    assert (error.line, error.code, error.num_problems) == (3, code, 1)
    assert error.message.startswith("data: line 3: ")
    assert error.problems[0].excerpt.isascii()
    assert len(error.message) < 400


def test_all_problems_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD] + [b"{"] * 40 + [b"[]"] * 2))
    with pytest.raises(DataRejected) as refused:
        read_jsonl(path, what="validation")
    assert refused.value.counts == {"bad_json": 40, "not_an_object": 2}
    assert [problem.line for problem in refused.value.problems] == list(range(2, 22))
    assert refused.value.message.startswith("validation: line 2: ")
    assert "and 41 more problems" in refused.value.message


def test_too_few_distinct_examples_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*chats(9), *chats(9)])
    with pytest.raises(DataRejected, match="9 distinct examples, at least 10") as refused:
        read_jsonl(path)
    assert (refused.value.line, refused.value.code) == (0, "too_few_examples")
    for empty in (b"", b"\n\n"):
        path.write_bytes(empty)
        with pytest.raises(DataRejected, match="0 distinct"):
            read_jsonl(path)


def test_too_many_examples_are_refused_where_they_begin(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", chats(30))
    with pytest.raises(DataRejected, match="more than 20 examples") as refused:
        read_jsonl(path, DataLimits(max_examples=20))
    assert (refused.value.line, refused.value.code) == (21, "too_many_examples")


def test_an_empty_line_in_the_middle_is_refused_and_at_the_end_is_not(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\r\n" + GOOD + b"\n\n  \n")
    assert read_jsonl(path, DataLimits(min_examples=1)).num_examples == 2
    path.write_bytes(GOOD + b"\n\n\n" + GOOD)
    with pytest.raises(DataRejected) as refused:
        read_jsonl(path, DataLimits(min_examples=1))
    assert (refused.value.line, refused.value.code) == (2, "empty_line")


def test_the_lines_behind_an_over_long_one_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * 1000 + b"\n" + GOOD + b"\n{\n")
    with pytest.raises(DataRejected) as refused:
        read_jsonl(path, DataLimits(max_line_bytes=200))
    assert [(problem.line, problem.code) for problem in refused.value.problems] == [
        (1, "line_too_long"),
        (3, "bad_json"),
    ]


def test_the_digest_is_of_the_content_not_of_its_spelling(tmp_path: Path) -> None:
    records = chats(12)
    plain = read_jsonl(write_jsonl(tmp_path / "plain.jsonl", records))
    spaced = tmp_path / "spaced.jsonl"
    spaced.write_text("\r\n".join(json.dumps(record, indent=None, separators=(" ,  ", " : ")) for record in records))
    assert read_jsonl(spaced).digest == plain.digest
    assert read_jsonl(write_jsonl(tmp_path / "other.jsonl", records[::-1])).digest != plain.digest


def test_records_come_back_with_line_and_digest(tmp_path: Path) -> None:
    dataset = read_jsonl(write_jsonl(tmp_path / "data.jsonl", [*chats(10), {"text": "a"}, *chats(2)]))
    found = list(dataset.records())
    assert [line for line, _, _ in found] == list(range(1, 14))
    assert found[0][1] == found[11][1] != found[1][1]
    assert dataset.kinds == {"chat": 12, "text": 1}
    assert dataset.num_duplicates == 2


def test_a_file_that_changed_after_the_check_is_not_read_as_if_it_had_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", chats(12))
    dataset = read_jsonl(path)
    for records in (chats(11), chats(13), [*chats(11), chat("x", "y")]):
        write_jsonl(path, records)
        with pytest.raises(DataRejected) as refused:
            list(dataset.records())
        assert refused.value.code == "file_changed"


def test_text_parts_are_joined_as_the_server_joins_them(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [parts, ANSWER]}])
    ((_, _, record),) = read_jsonl(path, DataLimits(min_examples=1)).records()
    assert record.messages[0].content == "a b"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
words = st.sampled_from(["role", "content", "weight", "messages", "prompt", "completion", "text", "tools", "user"])
roles = st.sampled_from(["system", "user", "assistant", "tool", "x"])
near_messages = st.fixed_dictionaries({"role": roles | json_values, "content": json_values | st.text()}) | json_values
near_records = st.dictionaries(words, json_values | st.lists(near_messages, max_size=4), max_size=3)
lines = (
    st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | near_records.map(lambda value: json.dumps(value).encode())
    | st.builds(lambda at, byte: GOOD[:at] + byte + GOOD[at + 1 :], st.integers(0, len(GOOD)), st.binary(max_size=2))
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(lines, max_size=6).map(b"\n".join))
def test_whatever_the_bytes_the_file_is_read_or_refused_by_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        dataset = read_jsonl(path, DataLimits(min_examples=1, max_line_bytes=200))
    except DataRejected as error:
        num_lines = content.count(b"\n") + 1
        for problem in error.problems:
            assert problem.code
            assert problem.message.isprintable()
            assert 1 <= problem.line <= num_lines or problem.code == "too_few_examples"
    else:
        count = sum(bool(line.strip()) for line in content.split(b"\n"))
        assert len(list(dataset.records())) == dataset.num_examples == count


def test_columns_that_an_exporter_fills_with_null_say_nothing(tmp_path: Path) -> None:
    """As `datasets` writes a table of mixed rows: every row has every column."""
    nulls = {"tool_calls": None, "name": None, "tool_call_id": None, "weight": None, "audio": None}
    parts = [{"type": "text", "text": "a", "image_url": None}]
    rows: list[dict[str, object]] = [
        {"messages": [{**USER, **nulls}, {**ANSWER, **nulls}], "tools": None, "prompt": None, "text": None},
        {"messages": [{**USER, "content": parts}, ANSWER], "prompt": None, "completion": None},
        {"prompt": "a", "completion": "b", "messages": None, "tools": None, "function_call": None},
        {"text": "a", "messages": None, "label": None},
    ]
    plain: list[dict[str, object]] = [
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "content": "a"}, ANSWER]},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
    ]
    for row, same in zip(rows, plain, strict=True):
        assert parse_record(json.dumps(row).encode()) == parse_record(json.dumps(same).encode())


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": None, "completion": "b", "messages": None}, "missing_key"),
        ({"prompt": None, "completion": "b"}, "wrong_type"),
        ({"text": None, "label": None}, "unknown_key"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": None}]}, "wrong_type"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "bad_tool_call"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "wrong_type"),
    ],
)
def test_a_null_in_the_place_of_what_is_learned_is_still_refused(row: dict[str, object], code: str) -> None:
    with pytest.raises(LineRefused) as refused:
        parse_record(json.dumps(row).encode())
    assert refused.value.code == code


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"example {index}"}) for index in range(12)]
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text("\r\n".join(lines), encoding="utf-8")
    marked.write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert marked.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert read_jsonl(marked).digest == read_jsonl(plain).digest
    assert [record for _, _, record in read_jsonl(marked).records()] == [
        record for _, _, record in read_jsonl(plain).records()
    ]


def test_reading_ends_at_the_most_problems_wanted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{}\n" * 100)
    for read in (read_jsonl, partial(convert, target=tmp_path / "converted")):
        with pytest.raises(DataRejected, match="and at least 6 more problems") as refused:
            read(path, limits=DataLimits(max_problems=7))
        assert refused.value.num_problems == 7

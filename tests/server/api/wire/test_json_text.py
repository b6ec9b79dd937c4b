"""JSON that two readers could read differently is refused; what goes out is always JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapters_store.parsing.json_pieces import JsonRules, TooManyValues, read_json
from server.api.wire.json_text import MAX_JSON_DEPTH, MalformedJson, json_bytes, json_string, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_goes_out_comes_back(value: object) -> None:
    assert parse_json(json_bytes(value)) == value


@given(st.text())
def test_a_string_literal_is_ascii_and_reads_back(text: str) -> None:
    assert json.loads(json_string(text).encode("ascii")) == text


def test_a_lone_surrogate_can_be_sent() -> None:
    assert json.loads(json_bytes({"text": "\ud83d"})) == {"text": "\ud83d"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_no_number_that_json_lacks_goes_out(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"logprob": number})


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH, MAX_JSON_DEPTH + 1, 5000, 200_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_is_bounded(depth: int, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    text = (opening * depth + "0" + closing * depth).encode()
    if depth <= MAX_JSON_DEPTH:
        parse_json(text)
    else:
        with pytest.raises(MalformedJson, match="nests deeper"):
            parse_json(text)


def test_a_duplicate_among_many_keys_is_found_quickly() -> None:
    good = json.dumps({str(index): 0 for index in range(100_000)})
    start_s = time.thread_time()
    parse_json(good.encode())
    without_s = time.thread_time() - start_s
    start_s = time.thread_time()
    with pytest.raises(MalformedJson, match="duplicate key '99999': given 2 times"):
        parse_json((good[:-1] + ',"99999":1}').encode())
    assert time.thread_time() - start_s < 1 + 10 * without_s  # a pair by pair comparison takes 1,000 times as long


JSON_VALUES = VALUES.map(lambda value: json.dumps(value, ensure_ascii=False))
NEAR_JSON = st.builds(
    lambda text, at, piece: text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) :],
    JSON_VALUES,
    st.integers(0, 1000),
    st.sampled_from([*'[]{},:"\\ 0-1.eE+nNtI\t', "null", "NaN", "-Infinity", "1,2,", "\ufeff", "\u0661", "-0,", "01"]),
)
PLAIN = JsonRules(pairs=dict, constant=float)


def outcome(read: Callable[[], object]) -> object:
    """What was read, with the types of its numbers, or where it was found not to be JSON."""
    try:
        return repr(read())
    except json.JSONDecodeError as error:
        return error.msg, error.pos
    except RecursionError:
        return "too deep"


@example("\ufeff[]")
@given(JSON_VALUES | NEAR_JSON | NEAR_JSON.map(lambda text: f" [ {text} , {text}]\n"))
def test_a_text_read_in_pieces_reads_as_pythons_reader_reads_it(text: str) -> None:
    in_pieces = outcome(lambda: read_json(text, replace(PLAIN, whole_chars=0)))
    assert in_pieces == outcome(lambda: json.loads(text))


@pytest.mark.parametrize("piece", ["[]", "{}", '""', "1.5", "null", '{"a":1}', "1"])
def test_a_long_text_holds_no_more_values_than_its_budget(piece: str) -> None:
    """However many there are: what is refused costs no more than what is taken."""
    for count in (1_000, 1_000_000):
        seen: list[object] = []
        rules = JsonRules(pairs=seen.append, constant=float, max_numbers=2_000)
        text = "[" + ",".join([piece] * count) + "]"
        if piece == "1" and count == 1_000:
            assert read_json(text, replace(rules, whole_chars=0)) == [1] * 1_000
            continue
        with pytest.raises(TooManyValues, match="at most 2000 whole numbers, or 62 lists and objects, or 500 others"):
            read_json(text, replace(rules, whole_chars=0))
        assert len(seen) <= 62


def test_one_call_into_c_reads_one_text_or_four_thousand_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them other threads have their turn; the event loop is one of them."""
    sizes: list[int] = []
    whole = json.loads

    def counted(text: str, **rules: Any) -> Any:
        value = whole(text, **rules)
        sizes.append(len(value))
        return value

    monkeypatch.setattr("adapters_store.parsing.json_pieces.json.loads", counted)
    assert parse_json(b'{"prompt": [' + b"12345, " * 100_000 + b"7]}") == {"prompt": [12345] * 100_000 + [7]}
    assert sum(sizes) > 99_000
    assert max(sizes) <= 4096

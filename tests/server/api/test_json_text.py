"""JSON that two readers could read differently is refused; what goes out is always JSON."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_text import MAX_JSON_DEPTH, MalformedJson, json_bytes, json_string, parse_json

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
    text = json.dumps({str(index): 0 for index in range(100_000)})[:-1] + ',"99999":1}'
    start_s = time.perf_counter()
    with pytest.raises(MalformedJson, match="'99999' is given 2 times"):
        parse_json(text.encode())
    assert time.perf_counter() - start_s < 1

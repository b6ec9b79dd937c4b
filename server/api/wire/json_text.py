"""JSON in and out, stricter than the standard library: no NaN, no duplicate keys, no deep nesting. Knows no HTTP."""

from __future__ import annotations

import json
from collections import Counter
from json.encoder import encode_basestring_ascii
from typing import Any, NoReturn

from adapters_store.parsing.json_pieces import JsonRules, TooDeep, TooManyValues, read_json
from adapters_store.parsing.strict_json import shown

MAX_JSON_DEPTH = 30  # a JSON schema nests two levels for each of the objects it describes
WHOLE_BYTES = 8192  # read in one go, in less time than a thread takes to be asked

# Compact JSON; raises ValueError on NaN and infinities. ASCII, because a lone surrogate in generated text has no UTF-8
# form but has an escape.
json_text = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
json_string = encode_basestring_ascii  # of one text; the fast path of streaming


class MalformedJson(ValueError):
    """Text that is not the JSON we accept; the message says what and where."""


def json_bytes(value: Any) -> bytes:
    return json_text(value).encode("ascii")


def parse_json(body: bytes) -> Any:
    """The value of one JSON text. Raises MalformedJson."""
    try:
        value = read_json(body.decode("utf-8"), _RULES)
    except MalformedJson:
        raise
    except TooManyValues as error:
        raise MalformedJson(f"the body holds {error}") from error
    except (TooDeep, RecursionError) as error:
        raise MalformedJson(_TOO_DEEP) from error
    except UnicodeDecodeError as error:
        raise MalformedJson(f"the body is not UTF-8: byte {error.start} cannot be decoded") from error
    except json.JSONDecodeError as error:
        raise MalformedJson(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:
        raise MalformedJson(f"the body holds a number that is too long: {error}") from error
    _check_depth(value)
    return value


_TOO_DEEP = f"the body nests deeper than {MAX_JSON_DEPTH} levels"


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedJson(f"the body is not JSON: {name} is not a JSON number")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise MalformedJson(f"duplicate key {shown(key)}: given {count} times")
    return result


_RULES = JsonRules(pairs=_unique_pairs, constant=_refuse_constant, whole_chars=WHOLE_BYTES, max_depth=MAX_JSON_DEPTH)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _containers_in(parent)]
        if not level:
            return
    raise MalformedJson(_TOO_DEEP)


def _containers_in(parent: Any) -> list[Any]:
    if type(parent) is dict:
        return [member for member in parent.values() if type(member) is dict or type(member) is list]
    if type(parent) is list:
        return [member for member in parent if type(member) is dict or type(member) is list]
    return []

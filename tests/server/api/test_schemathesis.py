"""schemathesis on our own OpenAPI: no request that the schema allows, or nearly allows, makes the server fail; nor does
one whose numbers have 400 digits.

Every operation gets its share of the examples, as a tenant and as an admin. MULTILORA_SCHEMA multiplies their number;
if it is not set, an admin sends a third as many to what is a tenant's.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

EXAMPLES = {GenerationMode.POSITIVE: 8, GenerationMode.NEGATIVE: 9}  # the latter cost three times as much
FACTOR = max(int(os.environ.get("MULTILORA_SCHEMA", "0")), 1)


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> list[Any]:
    schema = schemathesis.openapi.from_dict(app.openapi())
    return [result.ok() for result in schema.get_all_operations()]


def aim(case: Any) -> None:
    """At what there is, or most requests would end at an unknown name."""
    case.path_parameters = {
        name: "law" if value != 1 else value for name, value in (case.path_parameters or {}).items()
    }
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "law"


HUGE = 10**399  # 400 digits


def swell(value: Any) -> Any:
    """The same body with every number in it larger than a float can be."""
    if isinstance(value, dict):
        return {name: swell(member) for name, member in value.items()}
    if isinstance(value, list):
        return [swell(member) for member in value]
    return HUGE if isinstance(value, int | float) and not isinstance(value, bool) else value


def swell_case(case: Any) -> None:
    """Everything that is a number: in the body, the path and the query."""
    if isinstance(case.body, dict | list):
        case.body = swell(case.body)
    case.path_parameters = swell(case.path_parameters or {})
    case.query = swell(case.query or {})


def check(response: Any, case: Any) -> None:
    """Any answer but a fault of ours; errors in OpenAI's shape."""
    asked = case.as_curl_command()
    assert response.status_code < 500 or response.status_code == 503, f"{asked}\n{response.text}"
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        assert json.loads(response.content)["error"].keys() == {"message", "type", "param", "code"}, asked


def ask_all(operation: Any, mode: GenerationMode, send: Callable[[Any], None], *, share: int) -> None:
    """Send what the schema makes of one operation: one of `share` of its examples."""

    @given(case=operation.as_strategy(generation_mode=mode), is_aimed=st.booleans(), is_swollen=st.integers(0, 7))
    @settings(
        max_examples=EXAMPLES[mode] * FACTOR // share,
        derandomize=FACTOR == 1,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any, is_aimed: bool, is_swollen: int) -> None:
        if is_aimed:
            aim(case)
        if is_swollen == 0:
            swell_case(case)
        send(case)

    with suppress(Unsatisfiable):  # nothing about this operation can be got wrong
        ask()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("who", ["client", "admin"])
def test_no_request_of_the_schema_makes_the_server_fail(
    who: str,
    mode: GenerationMode,
    operations: list[Any],
    url: str,
    upload: Callable[..., object],
    request: pytest.FixtureRequest,
) -> None:
    caller: httpx.Client = request.getfixturevalue(who)
    upload(request.getfixturevalue("client"), "law")
    headers = {"Authorization": caller.headers["authorization"]}
    seen: Counter[int] = Counter()
    with requests.Session() as session:

        def send(case: Any) -> None:
            response = case.call(base_url=url, session=session, headers=headers)
            check(response, case)
            seen[response.status_code] += 1

        for operation in operations:
            is_admins = operation.path.startswith("/admin")
            if who == "admin" or not is_admins:
                is_less = who == "admin" and not is_admins and "MULTILORA_SCHEMA" not in os.environ
                ask_all(operation, mode, send, share=3 if is_less else 1)
    print(f"{who}, {mode.value}: {sum(seen.values())} requests, {len(operations)} operations, {sorted(seen.items())}")
    assert sum(seen.values()) > 100

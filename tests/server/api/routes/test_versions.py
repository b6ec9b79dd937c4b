"""Versions in service over the socket: canaries by user, promote, rollback, unload; and which version answered."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from support.worlds.fake_engine import FakeEngine

Upload = Callable[..., httpx.Response]
_numbers = itertools.count()
HEADER = "x-multilora-adapter-version"


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2, **fields})


def change(client: httpx.Client, ref: str, verb: str, **body: Any) -> httpx.Response:
    return client.post(f"/v1/adapters/{ref}/{verb}", json=body or None)


def shares(client: httpx.Client, name: str) -> list[tuple[int, int]]:
    return [(each["version"], each["percent"]) for each in client.get(f"/v1/adapters/{name}").json()["versions"]]


@pytest.fixture
def two(client: httpx.Client, upload: Upload) -> str:
    """A name of the test's own with two versions; the first is active."""
    name = f"law-{next(_numbers)}"
    upload(client, name, seed=1)
    assert upload(client, name, seed=2, activate=False).json()["active"] is False
    return name


def test_the_answer_says_which_version_gave_it(client: httpx.Client, two: str) -> None:
    for model, version in ((two, f"{two}@1"), (f"{two}@2", f"{two}@2")):
        answer = ask(client, model)
        assert answer.headers[HEADER] == version
        assert answer.json()["model"] == model
        assert ask(client, model, stream=True).headers[HEADER] == version
    chat = {"model": two, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=chat).headers[HEADER] == f"{two}@1"
    assert HEADER not in ask(client, "tiny").headers


def test_a_canary_answers_the_same_users_every_time(client: httpx.Client, two: str) -> None:
    assert change(client, f"{two}@2", "canary", percent=50).json()["percent"] == 50
    users = [f"user-{index}" for index in range(40)]
    once = {user: ask(client, two, user=user).headers[HEADER] for user in users}
    again = {user: ask(client, two, user=user).headers[HEADER] for user in reversed(users)}
    assert once == again
    counts = Counter(once.values())
    assert counts.keys() == {f"{two}@1", f"{two}@2"}
    assert min(counts.values()) >= 8


@pytest.mark.parametrize("field", ["safety_identifier", "prompt_cache_key"])
def test_openais_newer_names_of_a_user_are_as_good(client: httpx.Client, two: str, field: str) -> None:
    change(client, f"{two}@2", "canary", percent=50)
    for index in range(12):
        user = f"user-{index}"
        assert ask(client, two, **{field: user}).headers[HEADER] == ask(client, two, user=user).headers[HEADER]


def test_without_a_user_the_request_id_decides(client: httpx.Client, two: str) -> None:
    change(client, f"{two}@2", "canary", percent=50)
    body = {"model": two, "prompt": "hi", "max_tokens": 1}
    seen = set()
    for index in range(30):
        same = [
            client.post("/v1/completions", json=body, headers={"x-request-id": f"r{index}"}).headers[HEADER]
            for _ in range(2)
        ]
        assert same[0] == same[1]
        seen.add(same[0])
    assert len(seen) == 2


def test_promote_and_rollback_each_take_one_call(client: httpx.Client, two: str) -> None:
    change(client, f"{two}@2", "canary", percent=5)
    assert shares(client, two) == [(1, 95), (2, 5)]
    promoted = change(client, two, "promote").json()
    assert (promoted["version"], promoted["active"]) == (2, True)
    assert ask(client, two).headers[HEADER] == f"{two}@2"
    assert change(client, two, "rollback").json()["version"] == 1
    assert ask(client, two).headers[HEADER] == f"{two}@1"
    refused = change(client, two, "rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "nothing_before")


def test_an_older_version_is_activated(client: httpx.Client, upload: Upload, two: str) -> None:
    upload(client, two, seed=3)
    assert change(client, f"{two}@1", "activate").json()["versions"][0]["active"] is True
    assert ask(client, two).headers[HEADER] == f"{two}@1"


def test_an_unloaded_adapter_does_not_come_back_until_activated(client: httpx.Client, two: str) -> None:
    assert ask(client, two).status_code == 200
    unloaded = change(client, two, "unload").json()
    assert [each["loaded"] for each in unloaded["versions"]] == [False, False]
    for model in (two, f"{two}@1", f"{two}@2"):
        for _ in range(2):
            refused = ask(client, model)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_unloaded")
    assert two not in [model["id"] for model in client.get("/v1/models").json()["data"]]
    change(client, f"{two}@1", "activate")
    assert ask(client, two).status_code == 200


def test_unloading_frees_the_engine_of_what_nobody_serves(
    client: httpx.Client, other: httpx.Client, upload: Upload, fake_engine: FakeEngine
) -> None:
    digest = upload(client, "shared", seed=77).json()["digest"]
    upload(other, "shared", seed=77)
    change(client, "shared", "unload")
    assert digest not in fake_engine.forgotten
    assert ask(other, "shared").status_code == 200
    change(other, "shared", "unload")
    assert digest in fake_engine.forgotten


@pytest.mark.parametrize("verb", ["activate", "canary", "promote", "rollback", "unload"])
@pytest.mark.parametrize("ref", ["none", "none@1", "acme/none", "globex/law", "a/b/c", "x@y"])
def test_what_is_not_the_callers_is_a_404(client: httpx.Client, verb: str, ref: str) -> None:
    if "@" not in ref and verb in ("activate", "canary"):
        ref += "@1"
    if verb == "rollback":
        ref = ref.replace("@1", "")
    response = change(client, ref, verb, **({"percent": 1} if verb == "canary" else {}))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_an_admin_changes_a_tenants_versions_by_its_name(admin: httpx.Client, two: str) -> None:
    assert change(admin, f"acme/{two}@2", "activate").json()["id"] == f"acme/{two}@2"


@pytest.mark.parametrize(
    ("ref", "verb", "body", "param"),
    [
        ("@2", "canary", {"percent": 100}, "percent"),
        ("@2", "canary", {"percent": "5"}, "percent"),
        ("@2", "canary", {"percent": 5, "share": 5}, "share"),
        ("", "canary", {"percent": 5}, "name"),
        ("", "activate", {}, "name"),
    ],
)
def test_bad_input_is_a_400_that_names_it(
    client: httpx.Client, two: str, ref: str, verb: str, body: dict[str, Any], param: str
) -> None:
    response = change(client, two + ref, verb, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_openai_client_reads_the_version_and_is_not_disturbed(url: str, keys: dict[str, str], two: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=keys["acme"]) as client:
        raw = client.completions.with_raw_response.create(model=two, prompt="hi", max_tokens=2, user="someone")
    assert raw.headers[HEADER] == f"{two}@1"
    assert raw.parse().model == two


def test_the_answer_to_an_unload_shows_the_version_that_was_unloaded(client: httpx.Client, two: str) -> None:
    shown = change(client, f"{two}@2", "unload").json()
    assert (shown["id"], shown["loaded"]) == (f"{two}@2", False)
    assert change(client, two, "unload").json()["id"] == f"{two}@1"

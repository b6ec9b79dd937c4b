"""A batch through the stock client: every line once, each tenant its own, live requests first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from sqlalchemy import update

from adapters_store.accounts.records import Quotas
from adapters_store.errors import StoreError
from adapters_store.storage.schema import batches as batches_table
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.batches.runner import BatchRunner
from server.api.settings import ApiSettings
from server.engine.request import RequestError
from server.jobs.limits import BatchLimits
from support.servers.batch_client import CHAT, chat_line, create, ended, jsonl, read, running, upload
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture
def runner(app: FastAPI) -> Iterator[BatchRunner]:
    with running(app) as runner:
        yield runner


@pytest.fixture
def stalled(fake_engine: FakeEngine) -> Iterator[FakeEngine]:
    """The engine takes requests and answers none until the test lets it."""
    fake_engine.may_step.clear()
    yield fake_engine
    fake_engine.resume()


@pytest.fixture
def globex(url: str, keys: dict[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=keys["globex"], max_retries=0)


def seen_of_batches(engine: FakeEngine) -> list[Any]:
    return [request for request in engine.seen if request.tenant != request.owner]


def refused(call: Any, **fields: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(openai.APIStatusError) as error:
        call(**fields)
    return error.value.status_code, error.value.response.json()["error"]


def test_every_line_is_answered_as_a_live_request_is(ai: openai.OpenAI, runner: BatchRunner) -> None:
    lines = [chat_line(f"id {number}", f"Question {number}?") for number in range(9)]
    lines[4]["body"]["model"] = "nobody's"
    made = create(ai, lines, metadata={"night": "1"})
    assert (made.status, made.endpoint, made.metadata) == ("in_progress", CHAT, {"night": "1"})
    batch = ended(ai, made.id)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (9, 8, 1)
    output, [error] = read(ai, batch.output_file_id), read(ai, batch.error_file_id)
    assert [line["custom_id"] for line in output] == [f"id {number}" for number in range(9) if number != 4]
    for line in output:
        live = ai.chat.completions.create(**lines[int(line["custom_id"][3:])]["body"])
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
        assert line["error"] is None
    assert (error["custom_id"], error["response"]["status_code"]) == ("id 4", 404)
    assert error["response"]["body"]["error"]["code"] == "model_not_found"
    assert ai.files.retrieve(str(batch.output_file_id)).purpose == "batch_output"
    assert batch.id in {each.id for each in ai.batches.list(limit=1)}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 3}),
        ("/v1/responses", {"model": "tiny", "input": "Hello", "max_output_tokens": 5}),
    ],
)
def test_other_routes_are_answered_too(
    ai: openai.OpenAI, runner: BatchRunner, endpoint: str, body: dict[str, Any]
) -> None:
    batch = ended(ai, create(ai, [{"custom_id": "a", "method": "POST", "url": endpoint, "body": body}], endpoint).id)
    [line] = read(ai, batch.output_file_id)
    assert line["response"]["body"]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (jsonl([chat_line("a", "x"), chat_line("a", "y")]), "line 2: custom_id 'a' is that of an earlier line"),
        (b'{"custom_id": \n', "line 1: it is not JSON"),
        (b"[1]\n", "line 1: must be a JSON object"),
        (jsonl([{**chat_line("a", "x"), "url": "/v1/embeddings"}]), "line 1: url must be the batch's endpoint"),
        (jsonl([{**chat_line("a", "x"), "method": "GET"}]), "line 1: method must be 'POST'"),
        (jsonl([{**chat_line("a", "x"), "priority": 1}]), "line 1: unknown field 'priority'"),
        (jsonl([{**chat_line("a", "x"), "body": "x"}]), "line 1: body must be a JSON object"),
        (jsonl([chat_line("", "x")]), "line 1: custom_id must be a text of 1 to 512 characters"),
        (b"\n" + jsonl([chat_line("a", "x"), chat_line("b", "x", stream=True)]), "line 2: body: stream must be false"),
        (b" \n\n", "the file holds no request"),
    ],
)
def test_a_file_with_a_line_that_is_no_request_is_refused(ai: openai.OpenAI, data: bytes, says: str) -> None:
    fields = {"endpoint": CHAT, "completion_window": "24h"}
    status, error = refused(ai.batches.create, input_file_id=upload(ai, data), **fields)
    assert (status, error["code"], error["param"]) == (400, "invalid_batch_file", "input_file_id")
    assert says in error["message"]


def test_files_of_another_purpose_or_tenant_are_refused(ai: openai.OpenAI, globex: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"}
    data = jsonl([chat_line("a", "x")])
    status, error = refused(ai.batches.create, input_file_id=upload(ai, data, "fine-tune"), **fields)
    assert (status, error["code"]) == (400, "invalid_batch_file")
    status, error = refused(ai.batches.create, input_file_id=upload(globex, data), **fields)
    assert (status, error["code"]) == (404, "file_not_found")


def test_another_tenants_batch_does_not_exist(ai: openai.OpenAI, globex: openai.OpenAI, runner: BatchRunner) -> None:
    batch = ended(ai, create(ai, [chat_line("a", "secret")]).id)
    for call in (globex.batches.retrieve, globex.batches.cancel):
        status, error = refused(call, batch_id=batch.id)
        assert (status, error["code"]) == (404, "batch_not_found")
    assert refused(globex.files.content, file_id=batch.output_file_id)[0] == 404
    assert batch.id not in {each.id for each in globex.batches.list()}


def test_a_tenant_has_few_unfinished_batches(ai: openai.OpenAI, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    onboarding = app.state.onboarding
    monkeypatch.setattr(onboarding.batches, "_limits", BatchLimits(max_active=1))
    first = create(ai, [chat_line("a", "x")])
    status, error = refused(create, ai=ai, lines=[chat_line("b", "x")])
    assert (status, error["code"]) == (429, "too_many_batches")
    monkeypatch.setattr(onboarding, "batch_limits", BatchLimits(max_lines=1))
    status, error = refused(create, ai=ai, lines=[chat_line("a", "x"), chat_line("b", "x")])
    assert (status, error["code"]) == (400, "too_many_lines")
    with running(app):
        assert ended(ai, first.id).status == "completed"


def test_a_cancelled_batch_keeps_what_is_answered(
    ai: openai.OpenAI, runner: BatchRunner, fake_engine: FakeEngine
) -> None:
    fake_engine.stalls_at = fake_engine.num_steps + 60
    batch = create(ai, [chat_line(f"{number}", "Hello") for number in range(40)])
    wait_until(lambda: not fake_engine.may_step.is_set())
    cancelled = ai.batches.cancel(batch.id)
    assert cancelled.status == "cancelling"
    fake_engine.resume()
    batch = ended(ai, batch.id)
    assert batch.status == "cancelled"
    good, bad = read(ai, batch.output_file_id), read(ai, batch.error_file_id)
    assert sorted(int(line["custom_id"]) for line in good + bad) == [*range(40)]
    assert {line["error"]["code"] for line in bad} == {"batch_cancelled"}
    assert len(good) == batch.request_counts.completed
    assert ai.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_beyond_its_window_ends_with_a_reason_for_each_line(
    ai: openai.OpenAI, app: FastAPI, store: AdapterStore
) -> None:
    made = create(ai, [chat_line("a", "x"), chat_line("b", "x")])
    with store.database.write() as connection:
        connection.execute(update(batches_table).where(batches_table.c.id == made.id).values(expires_at=1))
    with running(app):
        batch = ended(ai, made.id)
    assert (batch.status, batch.output_file_id) == ("expired", None)
    assert [line["error"]["code"] for line in read(ai, batch.error_file_id)] == ["batch_expired"] * 2


def test_lines_wait_in_a_queue_of_their_own_and_leave_the_rates_alone(
    ai: openai.OpenAI, runner: BatchRunner, fake_engine: FakeEngine, store: AdapterStore
) -> None:
    store.quotas.set("acme", Quotas(requests_per_minute=1, weight=3))
    try:
        batch = create(ai, [chat_line(f"{number}", "Hello") for number in range(5)])
        assert ended(ai, batch.id).request_counts.completed == 5
        assert ai.completions.create(model="tiny", prompt="live", max_tokens=1)
    finally:
        store.quotas.set("acme", Quotas())
    last = seen_of_batches(fake_engine)[-1]
    assert (last.tenant, last.owner, last.cache_salt) == ("acme (batches)", "acme", "acme")
    assert last.weight == pytest.approx(0.03)


def test_beside_a_live_request_one_line_runs(ai: openai.OpenAI, runner: BatchRunner, stalled: FakeEngine) -> None:
    before = len(seen_of_batches(stalled))
    ask = {"model": "tiny", "prompt": "live", "max_tokens": 2}
    live = threading.Thread(target=ai.completions.create, kwargs=ask)
    live.start()
    wait_until(lambda: stalled.stats().num_running == 1)
    batch = create(ai, [chat_line(f"{number}", "Hello") for number in range(8)])
    wait_until(lambda: len(seen_of_batches(stalled)) == before + 1)
    assert runner._num_free() <= 0
    stalled.resume()
    live.join()
    assert ended(ai, batch.id).request_counts.completed == 8


def test_alone_as_many_lines_run_as_are_allowed(ai: openai.OpenAI, runner: BatchRunner, stalled: FakeEngine) -> None:
    before = len(seen_of_batches(stalled))
    batch = create(ai, [chat_line(f"{number}", "Hello") for number in range(8)])
    wait_until(lambda: len(seen_of_batches(stalled)) == before + BatchLimits().at_once)
    assert runner._num_free() == 0
    stalled.resume()
    assert ended(ai, batch.id).request_counts.completed == 8


def test_the_file_of_a_running_batch_stays(ai: openai.OpenAI, app: FastAPI) -> None:
    batch = create(ai, [chat_line("a", "x")])
    status, error = refused(ai.files.delete, file_id=batch.input_file_id)
    assert (status, error["code"]) == (409, "file_in_use")
    with running(app):
        ended(ai, batch.id)
    assert ai.files.delete(batch.input_file_id).deleted


def test_a_line_that_the_server_could_not_answer_is_tried_again(
    ai: openai.OpenAI, runner: BatchRunner, fake_engine: FakeEngine
) -> None:
    fake_engine.fail_next(RequestError("store_unavailable", "away", status=503))
    batch = ended(ai, create(ai, [chat_line("a", "x"), chat_line("b", "x")]).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)


def test_the_tries_of_a_line_give_what_is_away_the_time_to_come_back(
    ai: openai.OpenAI, runner: BatchRunner, fake_engine: FakeEngine
) -> None:
    fake_engine.seen.clear()
    for _ in range(3):
        fake_engine.fail_next(RequestError("store_unavailable", "away", status=503))
    batch = ended(ai, create(ai, [chat_line("a", "x")]).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (0, 1)
    first, second, third = (request.arrival_s for request in seen_of_batches(fake_engine))
    assert second - first >= 1.0
    assert third - second >= 2.0


def test_a_crash_between_the_files_and_the_end_doubles_nothing(
    ai: openai.OpenAI, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = create(ai, [chat_line("a", "x"), chat_line("b", "x")])
    failed = threading.Event()

    def crash(*_: object) -> None:
        failed.set()
        raise StoreError("disk_full", "no room")

    with monkeypatch.context() as patch, running(app):
        patch.setattr(app.state.onboarding.batches, "end", crash)
        wait_until(failed.is_set)
    with running(app):
        batch = ended(ai, batch.id)
    own = [file for file in ai.files.list(limit=1000) if batch.id in file.filename]
    assert [file.id for file in own] == [batch.output_file_id]
    assert [line["custom_id"] for line in read(ai, batch.output_file_id)] == ["a", "b"]
    assert not list((app.state.onboarding.data_dir / "uploads").iterdir())


def test_lines_that_are_kept_are_not_answered_again(ai: openai.OpenAI, app: FastAPI, fake_engine: FakeEngine) -> None:
    texts = [f"only once {number}" for number in range(30)]
    fake_engine.stalls_at = fake_engine.num_steps + 100
    batch = create(ai, [chat_line(text, text) for text in texts])
    with running(app):
        wait_until(lambda: not fake_engine.may_step.is_set())
    kept = app.state.onboarding.batches.get("acme", batch.id).num_completed
    assert 0 < kept < 30
    before = len(seen_of_batches(fake_engine))
    fake_engine.resume()
    with running(app):
        batch = ended(ai, batch.id)
    assert len(seen_of_batches(fake_engine)) - before == 30 - kept
    assert [line["custom_id"] for line in read(ai, batch.output_file_id)] == texts


def test_a_batch_ends_also_if_the_server_comes_back_with_a_smaller_limit_of_bodies(
    app: FastAPI, ai: openai.OpenAI, engine: FakeEngine, store: AdapterStore, data_dir: Path
) -> None:
    """Its lines were within the limit when it was made; another batch must not wait for it either."""
    long = create(ai, [chat_line("long", "word " * 90)])
    short = create(ai, [chat_line("short", "word")])
    smaller = ApiSettings(data_dir=data_dir, max_body_bytes=300)
    with running(create_app(engine=engine, store=store, settings=smaller)):
        assert [ended(ai, batch.id).request_counts.completed for batch in (long, short)] == [1, 1]

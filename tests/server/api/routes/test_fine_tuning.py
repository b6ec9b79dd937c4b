"""Files and fine-tuning jobs through the stock openai client: shapes, refusals by field and line, and whose is whose.

The worker is a real process whose trainer needs no torch; the engine is the fake one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.settings import ApiSettings
from server.engine.text.tokenizer import Tokenizer
from server.jobs.store.records import JobStatus
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, write
from support.servers.job_world import MODEL, JobWorld, data_lines
from support.servers.live_server import serving
from support.worlds.fake_engine import FakeEngine

ADMIN_KEY = "admin-key-for-tests"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path_factory.mktemp("jobs"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def store(world: JobWorld) -> AdapterStore:
    return world.store


@pytest.fixture(scope="module")
def app(world: JobWorld, tokenizer: Tokenizer) -> Iterator[FastAPI]:
    settings = ApiSettings(data_dir=world.data_dir, admin_keys=(ADMIN_KEY,))
    with FakeEngine(world.base, tokenizer) as engine:
        yield create_app(engine=engine, store=world.store, settings=settings)


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def keys(world: JobWorld) -> dict[str, str]:
    return {name: world.store.tenants.rotate_key(name).api_key for name in ("acme", "globex")}


@pytest.fixture(scope="module")
def acme(url: str, keys: dict[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=keys["acme"], max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def globex(url: str, keys: dict[str, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=keys["globex"], max_retries=0, timeout=300)


def upload(client: openai.OpenAI, data: bytes, name: str = "data.jsonl") -> str:
    return client.files.create(file=(name, data), purpose="fine-tune").id


def refusal(call: Any, *arguments: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as refused:
        call(*arguments, **fields)
    body = refused.value.response.json()["error"]
    return {"status": refused.value.status_code, **body}


def test_a_file_comes_is_listed_read_back_and_goes(acme: openai.OpenAI) -> None:
    data = data_lines(salt="file")
    file = acme.files.create(file=("mine.jsonl", data), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(data), "mine.jsonl", "fine-tune")
    assert acme.files.retrieve(file.id) == file
    assert acme.files.content(file.id).read() == data
    assert file.id in {each.id for each in acme.files.list(purpose="fine-tune")}
    assert acme.files.delete(file.id).deleted
    assert refusal(acme.files.retrieve, file.id)["code"] == "file_not_found"


def test_long_lists_come_in_pages(acme: openai.OpenAI) -> None:
    ids = [upload(acme, data_lines(salt=index)) for index in range(5)]
    listed = acme.files.list(limit=2)
    assert listed.has_more
    assert [each.id for each in listed][:5] == ids[::-1]
    assert [each.id for each in acme.files.list(limit=1000, order="asc")][-5:] == ids


@pytest.mark.parametrize(
    ("field", "status", "code"),
    [({"purpose": "assistants"}, 400, "unsupported_purpose"), ({"file": ("x.jsonl", b"")}, 400, "empty_file")],
)
def test_a_bad_upload_is_refused_by_field(acme: openai.OpenAI, field: Any, status: int, code: str) -> None:
    fields = {"file": ("x.jsonl", b"{}"), "purpose": "fine-tune", **field}
    told = refusal(acme.files.create, **fields)
    assert (told["status"], told["code"], told["param"]) == (status, code, next(iter(field)))


LINES = {
    "not_utf8": b'{"text": "\xff"}\n',
    "bad_json": b"{not json}\n",
    "wrong_role": b'{"messages": [{"role": "boss", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
    "no_assistant": b'{"messages": [{"role": "user", "content": "x"}]}\n',
    "empty_content": b'{"text": " "}\n',
    "unknown_key": b'{"text": "x", "label": 1}\n',
}


@pytest.mark.parametrize("code", LINES)
def test_bad_data_is_refused_by_line_before_anything_is_queued(acme: openai.OpenAI, code: str) -> None:
    lines = data_lines(12).splitlines(keepends=True)
    file = upload(acme, b"".join([*lines[:4], LINES[code], *lines[4:]]))
    before = len(list(acme.fine_tuning.jobs.list()))
    told = refusal(acme.fine_tuning.jobs.create, model=MODEL, training_file=file)
    assert (told["status"], told["code"], told["param"]) == (400, code, "training_file")
    assert "line 5" in told["message"]
    assert len(list(acme.fine_tuning.jobs.list())) == before


def test_a_file_of_another_form_is_checked_over_http_and_converted_for_its_job(acme: openai.OpenAI, url: str) -> None:
    alpaca = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}.", "id": n} for n in range(12)]
    file = upload(acme, json.dumps(alpaca).encode())
    headers = {"Authorization": f"Bearer {acme.api_key}"}
    report = httpx.get(f"{url}/v1/files/{file}/check", headers=headers).json()
    assert (report["object"], report["usable"], report["container"]) == ("file.check", True, "JSON list")
    assert (report["shapes"], report["notes"]) == ({"Alpaca": 12}, {"key 'id' left out": 12})
    job = acme.fine_tuning.jobs.create(model=MODEL, training_file=file)
    messages = [event.message for event in acme.fine_tuning.jobs.list_events(job.id).data]
    assert any("training_file: JSON list, 12 examples: Alpaca (12)" in message for message in messages)
    acme.fine_tuning.jobs.cancel(job.id)
    assert acme.files.content(file).content == json.dumps(alpaca).encode(), "the tenant's bytes are as they were"


def test_a_check_over_http_names_refused_lines_and_columns_and_opens_no_parquet(acme: openai.OpenAI, url: str) -> None:
    headers = {"Authorization": f"Bearer {acme.api_key}"}
    table = upload(acme, b"frage,antwort\n" + b"".join(b"Was ist %d?,%d\n" % (n, n) for n in range(12)))
    where = f"{url}/v1/files/{table}/check"
    report = httpx.get(where, headers=headers).json()
    assert (report["usable"], report["counts"], report["problems"][0]["line"]) == (False, {"unknown_format": 12}, 2)
    assert httpx.get(where, headers=headers, params={"columns": "user=frage,assistant=antwort"}).json()["usable"]
    wrong = httpx.get(where, headers=headers, params={"columns": "user=frage"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "columns")
    parquet = httpx.get(f"{url}/v1/files/{upload(acme, b'PAR1 and more')}/check", headers=headers).json()
    assert (parquet["usable"], parquet["problems"][0]["code"]) == (False, "unsupported_file")
    assert "multilora data check" in parquet["problems"][0]["message"]


BAD_FIELDS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
    ({"training_file": "file-none"}, 404, "file_not_found", "training_file"),
    ({"validation_file": "file-none"}, 404, "file_not_found", "validation_file"),
    ({"suffix": "no spaces"}, 400, "bad_name", "suffix"),
    ({"suffix": "a:b"}, 400, "bad_name", "suffix"),
    ({"suffix": MODEL}, 409, "name_is_base", "suffix"),
    ({"hyperparameters": {"n_epochs": 0}}, 400, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"epochs": 3}}, 400, "unknown_parameter", "hyperparameters.epochs"),
    ({"method": {"type": "reinforcement"}}, 400, "invalid_value", "method.type"),
    ({"extra_body": {"multilora": {"rank": 257}}}, 400, "invalid_value", "multilora.rank"),
    ({"extra_body": {"multilora": {"rankz": 8}}}, 400, "unknown_parameter", "multilora.rankz"),
    ({"extra_body": {"multilora": {"method": "full"}}}, 400, "unsupported_method", "multilora.method"),
    ({"extra_body": {"multilora": {"mix_file": "file-none"}}}, 404, "file_not_found", "multilora.mix_file"),
    ({"extra_body": {"optimizer": "sgd"}}, 400, "unknown_parameter", "optimizer"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "unsupported_parameter", "integrations"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD_FIELDS, ids=lambda each: str(each)[:40])
def test_a_bad_field_is_refused_by_name(
    acme: openai.OpenAI, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    asked = {"model": MODEL, "training_file": upload(acme, data_lines(12)), **fields}
    told = refusal(acme.fine_tuning.jobs.create, **asked)
    assert (told["status"], told["code"]) == (status, code), told
    assert (told["param"] or "").startswith(param), told


def test_the_training_file_cannot_be_its_own_validation(acme: openai.OpenAI) -> None:
    first, second = upload(acme, data_lines(12)), upload(acme, data_lines(12))
    told = refusal(acme.fine_tuning.jobs.create, model=MODEL, training_file=first, validation_file=second)
    assert (told["code"], told["param"]) == ("duplicate_file", "validation_file")


def test_a_job_keeps_what_was_asked_in_the_words_it_was_asked_in(acme: openai.OpenAI) -> None:
    job = acme.fine_tuning.jobs.create(
        model=MODEL,
        training_file=upload(acme, data_lines(12, salt="asked")),
        suffix="asked",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        metadata={"team": "legal"},
        extra_body={"multilora": {"rank": 4, "learning_rate": 1e-3, "target_modules": ["q_proj"]}},
    )
    assert (job.status, job.seed, job.metadata, job.error) == ("validating_files", 7, {"team": "legal"}, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert job.hyperparameters.learning_rate_multiplier == pytest.approx(5.0)
    ours = job.model_extra["multilora"]
    assert ours["spec"]["adapter"]["rank"] == 4
    assert "base" not in ours["spec"]
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    told = refusal(acme.fine_tuning.jobs.resume, job.id)
    assert (told["status"], told["code"]) == (409, "job_has_ended")


def pair_lines(count: int) -> bytes:
    """OpenAI's file of preferences."""
    bodies = [
        {
            "input": {"messages": [{"role": "user", "content": f"Who pays for repair {number}?"}]},
            "preferred_output": [{"role": "assistant", "content": "The tenant."}],
            "non_preferred_output": [{"role": "assistant", "content": "Ask again."}],
        }
        for number in range(count)
    ]
    return "".join(json.dumps(body) + "\n" for body in bodies).encode()


def test_a_job_of_preferences_takes_openais_file_and_method_and_no_other_file(acme: openai.OpenAI) -> None:
    def method(beta: float) -> Any:
        return {"type": "dpo", "dpo": {"hyperparameters": {"beta": beta, "learning_rate_multiplier": 2, "n_epochs": 1}}}

    pairs, chats = upload(acme, pair_lines(12)), upload(acme, data_lines(12, salt="no pairs"))
    job = acme.fine_tuning.jobs.create(model=MODEL, training_file=pairs, suffix="liked", method=method(0.2))
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.2)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (1, 2.0)
    assert job.model_extra["multilora"]["spec"]["objective"] == "dpo"
    events = acme.fine_tuning.jobs.list_events(job.id).data
    assert any("preference pairs (OpenAI) (12)" in event.message for event in events)
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    create = acme.fine_tuning.jobs.create
    told = refusal(create, model=MODEL, training_file=chats, method=method(0.2))
    assert (told["code"], told["param"]) == ("no_preference_data", "training_file")
    told = refusal(create, model=MODEL, training_file=pairs)
    assert (told["code"], told["param"]) == ("preference_data", "training_file")
    for wrong, param in (
        (method(9.0), "method.dpo.hyperparameters.beta"),
        ({"type": "dpo", "supervised": {}}, "method"),
    ):
        told = refusal(create, model=MODEL, training_file=pairs, method=wrong)
        assert told["status"] == 400
        assert told["param"].startswith(param)


def test_a_job_goes_on_from_the_adapter_that_its_model_names_and_keeps_its_form(
    world: JobWorld, acme: openai.OpenAI, globex: openai.OpenAI
) -> None:
    published = world.store.publish(
        tenant="acme",
        name="grown",
        config=config_bytes(r=4, lora_alpha=8),
        weights=write(world.root / "grown.safetensors", safetensors_bytes(lora_tensors(world.base))),
        base=world.base,
    )
    file = upload(acme, data_lines(12, salt="more"))
    create = acme.fine_tuning.jobs.create
    job = create(model=f"grown@{published.version}", training_file=file, suffix="grown")
    spec = job.model_extra["multilora"]["spec"]
    assert (spec["adapter"]["rank"], spec["adapter"]["alpha"]) == (4, 8.0)
    assert sorted(spec["adapter"]["target_modules"]) == ["q_proj", "v_proj"]
    started = world.jobs.get(job.id).run_dir / "initial_adapter"
    assert sorted(path.name for path in started.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    told = refusal(create, model="grown", training_file=file, extra_body={"multilora": {"rank": 8}})
    assert (told["code"], told["param"]) == ("invalid_value", "multilora.rank")
    theirs = upload(globex, data_lines(12, salt="theirs"))
    told = refusal(globex.fine_tuning.jobs.create, model="acme/grown", training_file=theirs)
    assert (told["status"], told["code"], told["param"]) == (404, "model_not_found", "model")


def test_nothing_of_another_tenants_is_seen_or_touched(acme: openai.OpenAI, globex: openai.OpenAI) -> None:
    file = upload(acme, data_lines(12, salt="secret"))
    job = acme.fine_tuning.jobs.create(model=MODEL, training_file=file, suffix="secret")
    for call in (globex.files.retrieve, globex.files.delete, globex.files.content):
        assert refusal(call, file)["status"] == 404
    jobs = globex.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.list_events, jobs.checkpoints.list, jobs.cancel, jobs.pause, jobs.resume):
        told = refusal(call, job.id)
        assert (told["status"], told["code"]) == (404, "job_not_found")
    assert refusal(jobs.create, model=MODEL, training_file=file)["code"] == "file_not_found"
    assert job.id not in {each.id for each in jobs.list()}
    assert file not in {each.id for each in globex.files.list()}
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_paused_and_resumed_before_it_began(acme: openai.OpenAI) -> None:
    job = acme.fine_tuning.jobs.create(model=MODEL, training_file=upload(acme, data_lines(12, salt="pause")))
    assert acme.fine_tuning.jobs.pause(job.id).status == "paused"
    assert acme.fine_tuning.jobs.resume(job.id).status == "validating_files"
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_from_file_to_chat_with_the_new_model(acme: openai.OpenAI, globex: openai.OpenAI, world: JobWorld) -> None:
    """The last of those without a worker; from here on one runs."""
    file = upload(acme, data_lines(12, steps=12))
    job = acme.fine_tuning.jobs.create(model=MODEL, training_file=file, suffix="style")
    acme.files.delete(file)  # a job keeps its own
    world.start_worker()
    ended = world.wait(world.jobs.get(job.id), lambda each: each.status.has_ended)
    assert ended.status is JobStatus.SUCCEEDED, ended.failure
    done = acme.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model == "ft:tiny:acme:style:1"
    assert done.trained_tokens == 1200
    assert done.finished_at is not None
    for model in (done.fine_tuned_model, "style", "style@1", "acme/style"):
        said = acme.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=40, temperature=0
        )
        assert "style@1" in (said.choices[0].message.content or "")
        assert acme.models.retrieve(model).parent == MODEL  # type: ignore[attr-defined]
        asked = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        assert refusal(globex.chat.completions.create, **asked)["code"] == "model_not_found"


def test_events_and_checkpoints_are_told_newest_first_in_pages(acme: openai.OpenAI) -> None:
    job = next(iter(acme.fine_tuning.jobs.list(limit=1)))
    events = list(acme.fine_tuning.jobs.list_events(job.id, limit=3))
    assert len(events) > 10
    assert events[0].message == "The job has succeeded"
    assert events[-1].message.startswith("Created fine-tuning job")
    losses = [event.data["train_loss"] for event in events if event.type == "metrics" and "train_loss" in event.data]  # type: ignore[index,operator]
    assert losses == sorted(losses)
    checkpoints = list(acme.fine_tuning.jobs.checkpoints.list(job.id))
    assert [each.step_number for each in checkpoints] == [10, 5]
    assert checkpoints[0].metrics.full_valid_loss is None
    assert checkpoints[0].metrics.valid_loss == pytest.approx(0.1)


def test_a_blocked_adapter_waits_for_an_operators_word(
    acme: openai.OpenAI, url: str, keys: dict[str, str], world: JobWorld
) -> None:
    job = acme.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(acme, data_lines(12, verdict="block")), suffix="risky"
    )
    world.wait_ended(world.jobs.get(job.id))
    blocked = acme.fine_tuning.jobs.retrieve(job.id)
    assert (blocked.status, blocked.error.code, blocked.fine_tuned_model) == ("failed", "gate_blocked", None)
    assert "worse than base" in blocked.error.message
    assert refusal(acme.models.retrieve, "risky")["code"] == "model_not_found"
    path, body = f"{url}/admin/jobs/{job.id}/override", {"reason": "the customer insists"}
    assert httpx.post(path, json=body, headers={"Authorization": f"Bearer {keys['acme']}"}).status_code == 403
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert httpx.post(path, json={}, headers=admin).json()["error"]["param"] == "reason"
    assert httpx.post(path, json=body, headers=admin).json()["status"] == "queued"
    ended = world.wait_ended(world.jobs.get(job.id))
    assert ended.status is JobStatus.SUCCEEDED
    assert acme.models.retrieve("risky").id == "risky"
    told = acme.fine_tuning.jobs.retrieve(job.id).model_extra["multilora"]
    assert (told["override"]["by"], told["override"]["reason"], told["verdict"]) == (
        "admin",
        "the customer insists",
        "block",
    )
    assert httpx.post(path, json=body, headers=admin).json()["error"]["code"] == "not_blocked"


def test_a_report_is_the_tenants_to_read(acme: openai.OpenAI, url: str, keys: dict[str, str], world: JobWorld) -> None:
    job = world.jobs.list("acme", (JobStatus.SUCCEEDED,))[0]
    path = f"{url}/v1/fine_tuning/jobs/{job.id}/report"
    own, other = ({"Authorization": f"Bearer {keys[name]}"} for name in ("acme", "globex"))
    assert httpx.get(path, headers=own).json()["error"]["code"] == "report_not_found"
    (job.run_dir / "report.json").write_text(json.dumps({"gate": "pass"}))
    (job.run_dir / "report.html").write_text("<p>hello</p>")
    assert httpx.get(path, headers=own).json() == {"gate": "pass"}
    page = httpx.get(path, params={"format": "html"}, headers=own)
    assert page.headers["content-type"].startswith("text/html")
    assert "sandbox" in page.headers["content-security-policy"]
    assert httpx.get(path, headers=other).status_code == 404


def test_bytes_missing_on_the_disk_are_a_503_that_names_the_file(
    url: str, keys: dict[str, str], world: JobWorld
) -> None:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys['acme']}"}) as files:
        form = {"file": ("a.jsonl", b'{"prompt": "gone", "completion": "b"}\n'), "purpose": (None, "fine-tune")}
        file = files.post("/v1/files", files=form).json()
        world.onboarding.files.path(world.onboarding.files.get("acme", file["id"])).unlink()
        for path in ("content", "check"):
            answer = files.get(f"/v1/files/{file['id']}/{path}")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "blob_missing"
            assert file["id"] in answer.json()["error"]["message"]
        assert files.get(f"/v1/files/{file['id']}").status_code == 200
        assert files.delete(f"/v1/files/{file['id']}").status_code == 200

"""The product as its users meet it: HTTP in, real weights behind it, the stock openai client on top."""

from __future__ import annotations

import concurrent.futures
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from server.api.app import create_app
from server.api.settings import ApiSettings
from support.servers.live_server import serving
from support.servers.service import Service, greedy_by_peft, make_base, running, save_adapters
from support.servers.waiting import wait_until

ADMIN_KEY = "an-admin-key-for-tests"
PROMPT = list(range(20, 70))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("e2e") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(base, tmp_path_factory.mktemp("e2e-adapters"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e-data")


@pytest.fixture(scope="module")
def service(base: Path, data_dir: Path) -> Iterator[Service]:
    with running(base, {}, data_dir) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service, data_dir: Path) -> Iterator[str]:
    settings = ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,))
    with serving(create_app(engine=service.worker, store=service.store, settings=settings)) as url:
        yield url


@pytest.fixture(scope="module")
def keys(url: str) -> dict[str, str]:
    """Two tenants made through the admin API."""
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    return {
        name: httpx.post(f"{url}/admin/tenants", json={"name": name}, headers=admin).json()["api_key"]
        for name in ("law", "med")
    }


def upload(url: str, key: str, name: str, folder: Path) -> httpx.Response:
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/adapters", data={"name": name}, files=files, headers=headers, timeout=300)


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def complete(client: openai.OpenAI, model: str, count: int = 24) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=count, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def expected_text(service: Service, base: Path, adapter: Path | None, count: int = 24) -> str:
    """PEFT's greedy tokens as text that continues the prompt."""
    from server.engine.request import SamplingParams
    from server.engine.text.output import OutputState

    tokenizer = service.worker.tokenizer
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    state = OutputState(params, tokenizer.token_texts, tokenizer.eos_ids, PROMPT)
    return "".join(state.append(token).text for token in greedy_by_peft(base, adapter, PROMPT, count))


def test_curl_uploads_an_adapter_and_the_next_request_uses_it(
    url: str, keys: dict[str, str], service: Service, base: Path, adapters: dict[str, Path]
) -> None:
    folder = adapters["plain"]
    auth = f"Authorization: Bearer {keys['law']}"
    form = ["-F", "name=style", "-F", f"config=@{folder}/adapter_config.json"]
    form += ["-F", f"weights=@{folder}/adapter_model.safetensors"]
    curl = ["curl", "-sS", "-H", auth, *form, f"{url}/v1/adapters"]
    uploaded = subprocess.run(curl, capture_output=True, text=True, check=True)
    assert '"version":1' in uploaded.stdout.replace(" ", "")
    text = complete(client_of(url, keys["law"]), "style")
    assert text == expected_text(service, base, folder)


def test_tenants_with_the_same_adapter_name_get_their_own_weights_in_one_batch(
    url: str, keys: dict[str, str], service: Service, base: Path, adapters: dict[str, Path]
) -> None:
    chosen = {"law": adapters["rslora"], "med": adapters["patterns"]}
    for tenant, folder in chosen.items():
        assert upload(url, keys[tenant], "same-name", folder).status_code == 201
    expected = {tenant: expected_text(service, base, folder, 64) for tenant, folder in chosen.items()}
    expected_base = expected_text(service, base, None, 64)

    def ask(tenant: str, model: str) -> str:
        return complete(client_of(url, keys[tenant]), model, 64)

    with concurrent.futures.ThreadPoolExecutor(9) as threads:
        mine = {tenant: [threads.submit(ask, tenant, "same-name") for _ in range(3)] for tenant in chosen}
        plain = [threads.submit(ask, "law", service.worker.served_name) for _ in range(3)]
        for tenant, answers in mine.items():
            assert {answer.result() for answer in answers} == {expected[tenant]}
        assert {answer.result() for answer in plain} == {expected_base}


def test_openai_client_streams_chats_and_lists_models(
    url: str, keys: dict[str, str], adapters: dict[str, Path]
) -> None:
    assert upload(url, keys["law"], "listed", adapters["one"]).status_code == 201
    client = client_of(url, keys["law"])
    names = {model.id for model in client.models.list()}
    assert "listed" in names
    assert not any("med" in name for name in names)
    messages = [{"role": "user", "content": "Who pays?"}]
    whole = client.chat.completions.create(model="listed", messages=messages, max_tokens=12, temperature=0)  # type: ignore[call-overload]
    pieces = client.chat.completions.create(
        model="listed", messages=messages, max_tokens=12, temperature=0, stream=True
    )  # type: ignore[call-overload]
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 12


def test_somebody_elses_adapter_is_unknown_whatever_it_is_called(
    url: str, keys: dict[str, str], adapters: dict[str, Path]
) -> None:
    assert upload(url, keys["law"], "secret", adapters["one"]).status_code == 201
    for ref in ("secret", "secret@1", "law/secret", "law/secret@1"):
        with pytest.raises(openai.NotFoundError) as refused:
            complete(client_of(url, keys["med"]), ref)
        assert refused.value.code == "model_not_found"


def test_deleted_adapter_is_gone_at_once_and_leaves_the_device(
    url: str, keys: dict[str, str], service: Service, adapters: dict[str, Path]
) -> None:
    created = upload(url, keys["med"], "brief", adapters["rank16"]).json()
    client = client_of(url, keys["med"])
    complete(client, "brief")
    assert created["digest"] in {resident.digest for resident in service.parts.engine.tiers.resident()}
    headers = {"Authorization": f"Bearer {keys['med']}"}
    assert httpx.delete(f"{url}/v1/adapters/brief", headers=headers).status_code == 200
    with pytest.raises(openai.NotFoundError):
        complete(client, "brief")
    tiers = service.parts.engine.tiers
    wait_until(lambda: created["digest"] not in {resident.digest for resident in tiers.resident()})


def test_client_that_hangs_up_gives_its_blocks_back(url: str, keys: dict[str, str], service: Service) -> None:
    body = {
        "model": service.worker.served_name,
        "prompt": PROMPT,
        "max_tokens": 900,
        "n": 16,  # long enough that a busy machine cannot finish before we hang up
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"Authorization": f"Bearer {keys['law']}"}
    pool, counters = service.parts.engine.scheduler.pool, service.stats().counters
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=300) as stream:
        first = next(stream.iter_lines())
        assert stream.status_code == 200, first
    wait_until(lambda: pool.num_free == pool.num_blocks)
    wait_until(lambda: service.stats().counters["aborted"] == counters["aborted"] + 16)


def test_bad_upload_writes_nothing_and_nobody_notices(
    url: str, keys: dict[str, str], service: Service, adapters: dict[str, Path]
) -> None:
    answers: list[str] = []
    reader = threading.Thread(target=lambda: answers.append(complete(client_of(url, keys["law"]), "tiny", 200)))
    reader.start()
    weights = (adapters["plain"] / "adapter_model.safetensors").read_bytes()
    config = (adapters["plain"] / "adapter_config.json").read_bytes()
    headers = {"Authorization": f"Bearer {keys['law']}"}
    before = service.store.list_versions("law")
    for broken in (weights[:-5], b"\x80\x04pickle", weights.replace(b"layers.0", b"layers.9"), b""):
        files = {"config": config, "weights": broken}
        answer = httpx.post(f"{url}/v1/adapters", data={"name": "bad"}, files=files, headers=headers)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"]
    reader.join()
    assert len(answers[0]) > 0
    assert service.store.list_versions("law") == before


def test_metrics_name_the_resident_adapters_once(url: str, keys: dict[str, str], adapters: dict[str, Path]) -> None:
    upload(url, keys["law"], "counted", adapters["subset"])
    complete(client_of(url, keys["law"]), "counted")
    wait_until(lambda: "counted@1" in httpx.get(f"{url}/metrics").text)
    text = httpx.get(f"{url}/metrics").text
    samples = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert len(samples) == 1
    assert "counted@1" in samples[0]
    assert "vllm:num_requests_running" in text

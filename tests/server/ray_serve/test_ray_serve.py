"""The whole API in two replicas of a real Ray Serve: whole streams, one request id, sticky keys, a replica's death.

Long form only, MULTILORA_FLEET=long: eight long streams under a redeploy, 2,000 requests under `kill -9`, or as many
as MULTILORA_FLEET_REQUESTS says.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
import pytest
import yaml

from support.servers.raw_http import dial, json_request
from support.servers.ray_cluster import RayCluster, answers, end_serve, free_ports, run_serve
from support.servers.service import make_base
from support.servers.waiting import wait_until

from .conftest import ADMIN_KEY

pytestmark = pytest.mark.skipif(os.environ.get("MULTILORA_FLEET") != "long", reason="long form: MULTILORA_FLEET=long")
NUM_REQUESTS = int(os.environ.get("MULTILORA_FLEET_REQUESTS", "2000"))
KEY = {"authorization": f"Bearer {ADMIN_KEY}"}
SMALL = {"threads": 1, "jobs": "off", "kv_cache_mib": 8, "adapter_pool_mib": 8, "host_cache_mib": 8}
BURST, BURST_ROUNDS, LONG = 40, 8, 3000
COST_ROUNDS, COST_REQUESTS = 10, 40


def two_ports() -> int:
    """The first of two free ports in a row, below those that Linux gives to outgoing connections."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000, 2):
        with suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", first))
            two.bind(("127.0.0.1", first + 1))
            return first
    raise AssertionError("no two free ports")


def completion(client: httpx.Client, url: str, num_tokens: int = 2, **headers: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True}
    return client.post(f"{url}/v1/completions", json=body, headers={**KEY, **headers})


@dataclass(frozen=True)
class Served:
    url: str
    cluster: RayCluster
    metrics_port: int
    config: Path

    def ask(self, client: httpx.Client, **headers: str) -> httpx.Response:
        return completion(client, self.url, **headers)

    def reaches_both(self) -> bool:
        with httpx.Client(timeout=300) as client:
            for number in range(16):
                self.ask(client, serve_multiplexed_model_id=f"m{number}")
        return min(self.answered_by_each()) > 0

    def replicas(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if "ServeReplica:default:multilora" in _title(each)]

    def sum_of(self, metric: str) -> float:
        return sum(self.of_each(metric))

    def of_each(self, metric: str) -> list[float]:
        """By each replica's own port."""
        pages = [httpx.get(f"http://127.0.0.1:{self.metrics_port + rank}/metrics").text for rank in (0, 1)]
        return [_value(page, metric) for page in pages]

    def answered_by_each(self) -> list[float]:
        return self.of_each("multilora_http_requests_total")


@pytest.fixture(scope="module")
def served(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ray")
    base = make_base(folder / "tiny", max_position_embeddings=2 * LONG)
    [port] = free_ports(1)
    metrics_port = two_ports()
    arguments: dict[str, Any] = {"base": str(base), "data_dir": str(folder / "data"), **SMALL}
    arguments["metrics_port"] = metrics_port
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "server.ray_serve.app:build",
        "args": arguments,
    }
    deployment = {"name": "multilora", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    config = folder / "serve.yaml"
    body = {"http_options": {"host": "127.0.0.1", "port": port}, "proxy_location": "HeadOnly"}
    config.write_text(yaml.safe_dump({**body, "applications": [{**application, "deployments": [deployment]}]}))
    run_serve(cluster, config)
    served = Served(f"http://127.0.0.1:{port}", cluster, metrics_port, config)
    wait_until(lambda: answers(f"{served.url}/ready"), timeout_s=900)
    wait_until(lambda: len(served.replicas()) == 2, timeout_s=900)
    for rank in (0, 1):
        wait_until(lambda rank=rank: answers(f"http://127.0.0.1:{metrics_port + rank}/metrics"), timeout_s=900)
    wait_until(served.reaches_both, timeout_s=900)  # the proxy hears of a replica after it has started
    yield served
    end_serve(cluster)


def test_answers_are_the_apis_with_one_request_id(served: Served) -> None:
    with httpx.Client(timeout=300) as client:
        answer = served.ask(client, **{"x-request-id": "mine-1"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 2
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
        refused = client.post(f"{served.url}/v1/completions", json={"model": "tiny"}, headers={})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "stream": True}
        with client.stream("POST", f"{served.url}/v1/completions", json=body, headers=KEY) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 3, "the stream came in one piece"


def test_a_model_header_stays_on_one_replica_and_each_replica_has_its_own_metrics(served: Served) -> None:
    shares = []
    with httpx.Client(timeout=300) as client:
        for name in ("law/style", "med/style", "code/style", "acme/x"):
            before = served.answered_by_each()
            for _ in range(4):
                served.ask(client, serve_multiplexed_model_id=name)
            after = served.answered_by_each()
            shares.append(sorted(int(now - then) for then, now in zip(before, after, strict=True)))
    assert shares == [[0, 4]] * 4


def test_a_tenants_key_stays_on_one_replica(served: Served) -> None:
    shares = []
    with httpx.Client(timeout=300) as client:
        for number in range(8):
            before = served.answered_by_each()
            for _ in range(8):
                served.ask(
                    client, authorization=f"Bearer stranger-{number}"
                )  # 401, by the replica that it is routed to
            after = served.answered_by_each()
            shares.append(sorted(int(now - then) for then, now in zip(before, after, strict=True)))
    assert shares == [[0, 8]] * 8


def test_a_burst_of_one_key_goes_to_both_replicas_and_what_follows_is_sticky_again(served: Served) -> None:
    """By the tenant's key alone, without a model's header. Rounds: each leaves its counts to the next. 24 and 16 if
    all are there before one has ended."""
    with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=BURST)) as client:
        asked = partial(completion, client, served.url)
        own, shares = set(used_by(served, asked, times=4)), []
        for _ in range(BURST_ROUNDS):
            before = served.answered_by_each()
            with ThreadPoolExecutor(BURST) as pool:
                burst = [pool.submit(asked, num_tokens=400) for _ in range(BURST)]
                assert Counter(each.result().status_code for each in burst) == {200: BURST}
            after = served.answered_by_each()
            shares.append([int(now - then) for now, then in zip(after, before, strict=True)])
            own |= set(used_by(served, asked, times=8))
    assert len(own) == 1, "requests one after the other went to both"
    print(f"{BURST} requests of one key at once, by replica, its own is {own}: {shares}")
    assert all(sum(each) == BURST for each in shares), shares
    assert median(min(each) for each in shares) >= BURST / 3, shares


def used_by(served: Served, act: Callable[[], object], *, times: int) -> list[int]:
    """The replicas that answered meanwhile."""
    before = served.answered_by_each()
    for _ in range(times):
        act()
    after = served.answered_by_each()
    return [rank for rank, (then, now) in enumerate(zip(before, after, strict=True)) if now > then]


def test_a_client_that_hangs_up_frees_its_request(served: Served) -> None:
    """With a stream and without one. It would take LONG tokens; each replica's gauges say what runs there."""
    url, tokens, aborted = f"{served.url}/v1/completions", "multilora_generated_tokens_total", "multilora_aborted_total"
    body = {"model": "tiny", "prompt": "Once", "max_tokens": LONG, "ignore_eos": True}

    def stream(client: httpx.Client) -> None:
        with client.stream("POST", url, json={**body, "stream": True}, headers=KEY) as answer:
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()  # held: where it is dropped, httpx ends the connection
            next(lines)
            wait_until(lambda: served.sum_of("vllm:num_requests_running") == 1, timeout_s=60)

    def wait(client: httpx.Client) -> None:
        with dial(served.url) as connection:
            connection.sendall(json_request("/v1/completions", body, key=ADMIN_KEY))
            wait_until(lambda: served.sum_of("vllm:num_requests_running") == 1, timeout_s=60)

    for hang_up in (stream, wait):
        num_tokens, num_aborted = served.sum_of(tokens), served.sum_of(aborted)
        with httpx.Client(timeout=300) as client:
            hang_up(client)
        start_s = time.monotonic()
        wait_until(lambda before=num_aborted: served.sum_of(aborted) == before + 1, timeout_s=60)
        print(f"{hang_up.__name__}: freed {time.monotonic() - start_s:.2f} s after the client was gone")
        wait_until(lambda: served.sum_of("vllm:num_requests_running") == 0, timeout_s=60)
        assert 0 < served.sum_of(tokens) - num_tokens < LONG


def test_what_a_request_costs_through_ray_beside_a_server_of_our_own(served: Served) -> None:
    """Rounds of one client at each in turn, the same base and settings; printed, and in the log."""
    took_ms: dict[str, list[float]] = {"ray": [], "plain": []}
    with plain_server(served) as plain, httpx.Client(timeout=300) as client:
        for _ in range(COST_ROUNDS):
            for name, url in (("ray", served.url), ("plain", plain)):
                for _ in range(COST_REQUESTS):
                    start_s = time.perf_counter()
                    assert completion(client, url, serve_multiplexed_model_id="tiny").status_code == 200
                    took_ms[name].append(1000 * (time.perf_counter() - start_s))
    for name, times in took_ms.items():
        print(f"{name}: {len(times)} requests, p50 {median(times):.1f} ms, p95 {quantiles(times, n=20)[18]:.1f} ms")
    rounds = [slice(COST_REQUESTS * index, COST_REQUESTS * (index + 1)) for index in range(COST_ROUNDS)]
    more = sorted(median(took_ms["ray"][each]) - median(took_ms["plain"][each]) for each in rounds)
    print(f"Ray's own cost by rounds: {median(more):.1f} ms ({more[0]:.1f} .. {more[-1]:.1f})")


@contextmanager
def plain_server(served: Served) -> Iterator[str]:
    """`multilora serve` on the same base, with the application's settings and a data directory of its own; its URL."""
    [port] = free_ports(1)
    options = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).with_name("multilora")), "serve", "--port", str(port), *options]
    command += ["--base", str(served.config.parent / "tiny"), "--data-dir", str(served.config.parent / "plain")]
    log = (served.config.parent / "plain.log").open("wb")
    with log, subprocess.Popen(command, env=served.cluster.environment, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/ready"), timeout_s=900)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def test_a_dead_replica_costs_clients_one_retry_and_answers_as_ours(served: Served) -> None:
    statuses: Counter[int] = Counter()

    def asked(client: httpx.Client, index: int) -> int:
        first = served.ask(client, serve_multiplexed_model_id=f"m{index}")
        if first.status_code == 200:
            return 200
        assert first.headers["content-type"] == "application/json", (first.status_code, first.text)
        assert (first.status_code, first.json()["error"]["code"]) == (503, "replica_lost"), first.text
        statuses[503] += 1
        time.sleep(float(first.headers["retry-after"]))
        return served.ask(client, serve_multiplexed_model_id=f"m{index}").status_code

    with httpx.Client(timeout=300) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(asked, client, index) for index in range(NUM_REQUESTS)]
        wait_until(lambda: sum(each.done() for each in answers) > 10, timeout_s=900)
        served.replicas()[0].kill()
        assert Counter(each.result() for each in answers) == {200: NUM_REQUESTS}
    print(f"kill -9 of a replica under 8 clients: {statuses[503]} of {NUM_REQUESTS} were sent again, none failed")
    wait_until(lambda: len(served.replicas()) == 2, timeout_s=900)


def test_streams_end_whole_while_the_application_is_deployed_anew(served: Served) -> None:
    def whole(_: int) -> bool:
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        url = f"{served.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=KEY, timeout=900) as stream:
            return [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(whole, index) for index in range(8)]
        body = yaml.safe_load(served.config.read_text())
        body["applications"][0]["args"]["log_format"] = "json"
        served.config.write_text(yaml.safe_dump(body))
        run_serve(served.cluster, served.config)
        assert [each.result() for each in streams] == [True] * 8


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _value(page: str, name: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith(name) and 'route="/metrics"' not in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)

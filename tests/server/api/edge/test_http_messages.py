"""Everything in an HTTP message that is no header and no body, over both event loops and a real socket."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from server.api.edge.connections.http_messages import MAX_PIPELINED
from server.api.settings import ApiSettings
from support.servers.live_server import LOOPS, serving
from support.servers.raw_http import dial, head, read_response
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

MAX_HEADER_BYTES = 8_000
FAR_BEYOND_BYTES = 16 << 20  # more than the sockets' buffers and the limit together
ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
BODY = json.dumps(ASK).encode()


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, auth="off", max_header_bytes=MAX_HEADER_BYTES, max_header_count=30)


@pytest.fixture(scope="module", params=LOOPS)
def url(app: FastAPI, request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(app, loop=request.param) as url:
        yield url


def chunked_head(**headers: str) -> bytes:
    return head("POST", "/v1/completions", Content_Type="application/json", Transfer_Encoding="chunked", **headers)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def whole(body: bytes = BODY, trailers: bytes = b"", **headers: str) -> bytes:
    return chunked_head(**headers) + chunk(body) + b"0\r\n" + trailers + b"\r\n"


def send_until_refused(connection: socket.socket, piece: bytes) -> int:
    """Sends a piece again and again; returns the bytes that went before the server closed the connection."""
    num_bytes = 0
    try:
        while num_bytes < FAR_BEYOND_BYTES:
            connection.sendall(piece)
            num_bytes += len(piece)
    except (ConnectionResetError, BrokenPipeError):
        return num_bytes
    raise AssertionError(f"the server took {num_bytes} bytes")


def test_a_trailer_does_not_name_the_tenant(url: str, client: httpx.Client, upload: object) -> None:
    assert callable(upload)
    with httpx.Client(base_url=url, headers={"X-Tenant-Id": "globex"}, timeout=300) as theirs:
        assert upload(theirs, "secret").status_code == 201
    asked = json.dumps({**ASK, "model": "secret"}).encode()
    with dial(url) as connection:
        connection.sendall(whole(asked, b"X-Tenant-Id: globex\r\n"))
        assert read_response(connection).status == 404


def test_a_trailer_is_no_key(url: str) -> None:
    """The admin's routes ask for a key even here."""
    with dial(url) as connection:
        start = head("GET", "/admin/tenants", Transfer_Encoding="chunked")
        connection.sendall(start + b"0\r\nAuthorization: Bearer admin-key-for-tests\r\n\r\n")
        assert read_response(connection).status == 403


def test_a_few_trailers_are_dropped_and_the_connection_goes_on(url: str) -> None:
    with dial(url) as connection:
        for _ in range(3):
            connection.sendall(whole(trailers=b"X-Checksum: 1\r\nExpect: 100-continue\r\n"))
            assert read_response(connection).status == 200


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"0\r\n", b"a:b\r\n" * 1000),
        (b"0\r\nX-Endless: ", b"x" * 4096),
        (b"0\r\nX-End", b"x" * 4096),
        (b"1;", b"x" * 4096),
        (b"", b"1;" + b"x" * 500 + b"\r\n \r\n"),
        (b"", b"0" * 4096),
    ],
    ids=["trailers", "a trailer", "a trailer's name", "an extension", "many extensions", "a chunk's size"],
)
def test_what_surrounds_a_body_ends_at_the_limit_of_headers(url: str, start: bytes, piece: bytes) -> None:
    with dial(url) as connection:
        connection.sendall(chunked_head() + start)
        send_until_refused(connection, piece)


def test_the_refusal_of_trailers_names_the_limit(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(chunked_head() + b"0\r\n")
        for _ in range(MAX_HEADER_BYTES // 400 + 1):
            connection.sendall(b"X-More: " + b"x" * 390 + b"\r\n")
        response = read_response(connection)
        assert (response.status, response.error["code"]) == (431, "headers_too_large")
        assert str(MAX_HEADER_BYTES) in response.error["message"]


def test_empty_lines_before_a_request_end_at_the_same_limit(url: str) -> None:
    with dial(url) as connection:
        send_until_refused(connection, b"\r\n" * 1000)


def test_a_body_in_small_chunks_is_taken(url: str) -> None:
    body = BODY + b" " * 20_000
    with dial(url) as connection:
        connection.sendall(
            chunked_head() + b"".join(chunk(body[at : at + 1]) for at in range(len(body))) + b"0\r\n\r\n"
        )
        assert read_response(connection).status == 200


@given(data=st.data())
@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_message_means_the_same_however_it_is_cut(url: str, data: st.DataObject) -> None:
    """Chunks, extensions, trailers and pieces on the wire as they come: the answer is that of the plain request."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(BODY) - 1), max_size=12)))
    words = st.text("abcXYZ-", min_size=1, max_size=8).map(str.encode)
    parts = [BODY[start:end] for start, end in zip([0, *cuts], [*cuts, len(BODY)], strict=True)]
    message = chunked_head(**data.draw(st.sampled_from([{}, {"Connection": "Upgrade", "Upgrade": "h2c"}])))
    message += b"".join(chunk(part, b";" + data.draw(words)) for part in parts) + b"0\r\n"
    message += b"".join(b"%b: %b\r\n" % field for field in data.draw(st.lists(st.tuples(words, words), max_size=5)))
    message += b"\r\n"
    ends = sorted(data.draw(st.sets(st.integers(1, len(message) - 1), max_size=6)))
    plain = httpx.post(f"{url}/v1/completions", json=ASK).json()["choices"]
    with dial(url) as connection:
        for start, end in zip([0, *ends], [*ends, len(message)], strict=True):
            connection.sendall(message[start:end])
        response = read_response(connection)
    assert response.status == 200, response.body
    assert json.loads(response.body)["choices"] == plain


def test_some_requests_may_be_pipelined_and_are_answered_in_order(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(b"".join(head("GET", f"/nothing/{index}") for index in range(MAX_PIPELINED)))
        stream = connection.makefile("rb").read1
        got = b""
        while got.count(b"HTTP/1.1 404") < MAX_PIPELINED or not got.endswith(b"}"):
            got += stream(1 << 16)
    at = [got.index(b"/nothing/%d:" % index) for index in range(MAX_PIPELINED)]
    assert at == sorted(at)


def test_too_many_pipelined_requests_end_the_connection(url: str, app: FastAPI) -> None:
    """Each costs memory before the first is answered, and a piece of 256 KiB has room for 8,000."""
    before = num_requests(app)
    with dial(url) as connection:
        connection.sendall(head("GET", "/nothing") * 4_000)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
    assert num_requests(app) - before < 500


def num_requests(app: FastAPI) -> float:
    samples = [sample for metric in app.state.context.metrics.http_requests.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def test_a_hang_up_ends_the_request_that_others_wait_behind(url: str, fake_engine: FakeEngine) -> None:
    num_aborted = len(fake_engine.aborted)
    body = json.dumps({**ASK, "max_tokens": 400, "stream": True}).encode()
    fake_engine.stalls_at = fake_engine.num_steps + 1
    with dial(url) as connection:
        connection.sendall(whole(body) + whole(body))
        assert connection.recv(12) == b"HTTP/1.1 200"
    try:
        wait_until(lambda: len(fake_engine.aborted) == num_aborted + 1)
    finally:
        fake_engine.resume()


UPGRADES = {
    "jdk": {"Connection": "Upgrade, HTTP2-Settings", "HTTP2_Settings": "AAEAAEAAAAIAAAABAAMAAABk", "Upgrade": "h2c"},
    "curl": {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAAQCAAAAAAIAAAAA"},
    "websocket": {"Connection": "Upgrade", "Upgrade": "websocket"},
}


@pytest.mark.parametrize("kind", UPGRADES)
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_kept(url: str, kind: str) -> None:
    sized = {"Content_Type": "application/json", "Content_Length": str(len(BODY)), **UPGRADES[kind]}
    with dial(url) as connection:
        for request in (head("POST", "/v1/completions", **sized) + BODY, whole(**UPGRADES[kind])):
            connection.sendall(request)
            assert read_response(connection).status == 200
        connection.sendall(head("GET", "/health", **UPGRADES[kind]) + head("GET", "/health"))
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 2:  # the second is the request behind the offer
            more = connection.recv(1 << 16)
            assert more, answers
            answers += more


def test_an_offer_to_upgrade_leaves_the_limits_as_they_are(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(chunked_head(**UPGRADES["jdk"]) + b"0\r\n")
        send_until_refused(connection, b"a:b\r\n" * 1000)
    with dial(url) as connection:
        connection.sendall(chunked_head(X_Long="x" * 9_000, **UPGRADES["jdk"]))
        assert read_response(connection).status == 431


def test_connect_is_refused(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n\r\nSSH-2.0\r\n")
        assert read_response(connection).status == 400


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_that_offers_http2_gets_its_answer(url: str) -> None:
    command = ["curl", "-sS", "--http2", "-H", "Content-Type: application/json", "-d", BODY.decode()]
    done = subprocess.run([*command, f"{url}/v1/completions"], check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["text"]


JAVA = """
import java.net.URI;
import java.net.http.*;
public class Ask {
    public static void main(String[] words) throws Exception {
        HttpClient client = HttpClient.newHttpClient();  // offers HTTP/2 by default
        for (int round = 0; round < 2; round++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(words[0]))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(words[1])).build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version());
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")
def test_the_jdks_client_gets_its_answer(url: str, tmp_path: Path) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    command = ["java", str(source), f"{url}/v1/completions", BODY.decode()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["200 HTTP_1_1"] * 2, done.stderr

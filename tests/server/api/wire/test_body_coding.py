"""Compressed bodies: decoded piece by piece, bounded by what they decode to, and refused where they are not gzip."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from starlette.types import Message

from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.api.wire.body_coding import CHUNK_BYTES, GzipBody
from server.api.wire.errors import ApiError
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.servers.raw_http import dial, head, read_response

MAX_BODY_BYTES = 1 << 20
ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, auth="off", max_body_bytes=MAX_BODY_BYTES)


def post(url: str, body: bytes, coding: str = "gzip") -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    return httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=300)


def decoded(pieces: list[bytes], max_bytes: int = MAX_BODY_BYTES) -> list[bytes]:
    """What an app receives of such a body."""
    waiting: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting[-1]["more_body"] = False

    async def receive() -> Message:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def read() -> list[bytes]:
        body, got = GzipBody(receive, max_bytes), []
        while (message := await body.receive())["type"] == "http.request":
            got.append(message["body"])
            assert (message["more_body"] is False) <= (not waiting), "the end came before the last piece"
        return got

    return asyncio.run(read())


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
def test_a_gzip_body_is_answered_as_the_plain_one(url: str, coding: str) -> None:
    plain = httpx.post(f"{url}/v1/completions", json=ASK, timeout=300).json()["choices"]
    answer = post(url, gzip.compress(json.dumps(ASK).encode()), coding)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain


def test_an_upload_may_be_gzip(url: str, engine: EngineClient) -> None:
    files = {"config": config_bytes(), "weights": safetensors_bytes(lora_tensors(engine.base, seed=3))}
    plain = httpx.Request("POST", f"{url}/v1/adapters", data={"name": "packed"}, files=files)
    headers = {"Content-Type": plain.headers["content-type"], "Content-Encoding": "gzip"}
    answer = httpx.post(plain.url, content=gzip.compress(plain.read()), headers=headers, timeout=300)
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, br", "aes128gcm", "\xe4"])
def test_another_coding_is_a_415_that_names_what_is_taken(url: str, coding: str) -> None:
    with dial(url) as connection:
        fields = {"Content_Type": "application/json", "Content_Encoding": coding, "Content_Length": "2"}
        connection.sendall(head("POST", "/v1/completions", **fields) + b"{}")
        answer = read_response(connection)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_content_encoding")
    assert answer.headers["accept-encoding"] == "gzip, identity"


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate, chunked"])
def test_another_transfer_coding_is_a_501(url: str, coding: str) -> None:
    with dial(url) as connection:
        start = head("POST", "/v1/completions", Content_Type="application/json", Transfer_Encoding=coding)
        connection.sendall(start + b"0\r\n\r\n")
        assert read_response(connection).status == 501


WHOLE = gzip.compress(json.dumps(ASK).encode(), mtime=0)  # the ids of the tests are made of it


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (json.dumps(ASK).encode(), "incorrect header"),
        (WHOLE[:-1], "ends too early"),
        (WHOLE[:5], "ends too early"),
        (WHOLE + b"x", "data follows"),
        (WHOLE + WHOLE, "data follows"),
        (WHOLE[:-8] + b"\0" * 8, "incorrect data check"),
        (zlib.compress(b"{}"), "incorrect header"),
    ],
)
def test_what_is_no_gzip_is_a_400(url: str, body: bytes, words: str) -> None:
    answer = post(url, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_gzip")
    assert words in answer.json()["error"]["message"]


def test_the_limit_is_that_of_the_decoded_bytes(url: str) -> None:
    fits = json.dumps(ASK).encode().ljust(MAX_BODY_BYTES)
    assert post(url, gzip.compress(fits)).status_code == 200
    answer = post(url, gzip.compress(fits + b" "))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert str(MAX_BODY_BYTES) in answer.json()["error"]["message"]


def test_a_bomb_costs_no_more_than_the_limit() -> None:
    """A gigabyte in a megabyte: refused after as much as any body may have, in pieces of one size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(1024)), packer.flush()])
    assert len(bomb) < 2 * MAX_BODY_BYTES
    tracemalloc.start()
    with pytest.raises(ApiError, match=f"at most {MAX_BODY_BYTES}"):
        decoded([bomb])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 * MAX_BODY_BYTES


@given(
    data=st.binary(max_size=400) | st.integers(0, 5).map(lambda count: bytes(count * CHUNK_BYTES)),
    cuts=st.sets(st.integers(0, 600), max_size=8),
)
@examples(max_examples=200)
def test_a_body_decodes_to_itself_however_it_is_cut(data: bytes, cuts: set[int]) -> None:
    packed = gzip.compress(data)
    ends = [*sorted(cut for cut in cuts if cut < len(packed)), len(packed)]
    pieces = [packed[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    got = decoded(pieces)
    assert b"".join(got) == data
    assert all(len(piece) <= CHUNK_BYTES for piece in got)


def test_no_body_at_all_is_no_fault_of_its_coding(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"Content-Encoding": "gzip"}).status_code == 200


@pytest.mark.parametrize("length", [9_000_000, 2])
def test_an_answer_instead_of_100_continue_ends_the_connection(url: str, length: int) -> None:
    """The body that was announced does not come; the next request must not be taken for it."""
    path = "/v1/completions" if length > MAX_BODY_BYTES else "/v1/nothing"
    with dial(url) as connection:
        connection.sendall(head("POST", path, Content_Length=str(length), Expect="100-continue"))
        answer = read_response(connection)
        assert answer.status == (413 if length > MAX_BODY_BYTES else 404)
        assert answer.headers["connection"] == "close"
        assert connection.recv(1) == b""


def test_100_continue_asks_for_the_body(url: str) -> None:
    body = json.dumps(ASK).encode()
    fields = {"Content_Type": "application/json", "Content_Length": str(len(body)), "Expect": "100-continue"}
    with dial(url) as connection:
        connection.sendall(head("POST", "/v1/completions", **fields))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = read_response(connection)
        assert (answer.status, answer.headers.get("connection")) == (200, None)

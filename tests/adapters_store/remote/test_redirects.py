"""An object store that sends its clients to another host: what that host learns, and what of it counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.remote.bucket import Bucket

SECRET, TOKEN, ADAPTER = "the-secret-key", "the-session-token", b"bytes of a private adapter"


@dataclass
class Seen:
    """One request at the other host."""

    method: str
    headers: dict[str, str]
    body: bytes


@dataclass
class OtherHost:
    """Answers everything with 200. requests: all that came."""

    requests: list[Seen] = field(default_factory=list)
    url: str = ""


def serving(stack: ExitStack, answer: type[BaseHTTPRequestHandler]) -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), answer)
    server.daemon_threads, server.block_on_close = True, False  # clients keep idle connections
    threading.Thread(target=server.serve_forever).start()
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return server.server_port


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def say(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        """Quiet."""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherHost]:
    other = OtherHost()

    class Other(Answer):
        def do_GET(self) -> None:
            other.requests.append(Seen(self.command, dict(self.headers.items()), self.body()))
            self.say(200, b"hello", etag='"1"', last_modified="Sun, 29 Nov 2026 10:00:00 GMT")

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    class ObjectStore(Answer):
        def do_GET(self) -> None:
            self.body()
            self.say(307, b"", location=f"{other.url}{self.path}")

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    with ExitStack() as stack:
        other.url = f"http://localhost:{serving(stack, Other)}"
        variables = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": SECRET, "SESSION_TOKEN": TOKEN, "REGION": "us-east-1"}
        variables["ENDPOINT_URL"] = f"http://127.0.0.1:{serving(stack, ObjectStore)}"
        for name, value in variables.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield other


def test_a_redirect_to_another_host_gives_it_no_signature_and_no_adapter(other: OtherHost) -> None:
    """obstore follows it for reads. The session token alone opens nothing: every request is signed with the secret."""
    bucket = Bucket.at("s3://bucket/store")
    for write in (bucket.put_new, bucket.replace):
        with pytest.raises(StoreUnavailable):
            write("blobs/x", ADAPTER)
        bucket.forget_absence()
    assert bucket.read("blobs/x") == b"hello"
    assert bucket.head("blobs/x") is not None
    assert [seen.method for seen in other.requests] == ["GET", "HEAD"]
    for seen in other.requests:
        assert "authorization" not in {name.lower() for name in seen.headers}
        assert SECRET not in repr(seen.headers)
        assert seen.body == b""


def test_a_bucket_is_not_taken_for_ours_by_a_redirect(other: OtherHost) -> None:
    """The other host's store.json would have to hold this database's id, which it never learns."""
    bucket = Bucket.at("s3://bucket/store")
    with pytest.raises(StoreError) as refused:
        bucket.require_ours("an-id")
    assert refused.value.code == "wrong_store"
    assert "an-id" not in repr(other.requests)

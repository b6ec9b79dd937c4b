"""An HTTP proxy before an object store, which misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

Headers = dict[str, str]


class Faults:
    """is_away: connections are cut. ignores_create: If-None-Match is dropped. change: of each GET's body. slow: a GET
    of a path that ends so waits until `go_on`."""

    def __init__(self) -> None:
        self.is_away = False
        self.ignores_create = False
        self.change: Callable[[bytes], bytes] = lambda body: body
        self.slow: tuple[str, ...] = ()
        self.go_on = threading.Event()
        self.methods: list[str] = []


@contextmanager
def proxied(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """The address of a proxy before `endpoint`, and its faults."""
    faults = Faults()
    client = httpx.Client(base_url=endpoint, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            faults.methods.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.command == "GET" and self.path.partition("?")[0].endswith(faults.slow):
                faults.go_on.wait(60)
            if faults.is_away:
                self.close_connection = True
                return
            hidden = {"host", "connection", *({"if-none-match"} if faults.ignores_create else ())}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hidden}
            answer = client.request(self.command, self.path, headers=headers, content=body)
            content = faults.change(answer.content) if self.command == "GET" else answer.content
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("content-length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

        def log_message(self, format: str, *words: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False  # clients keep idle connections
    thread = threading.Thread(target=server.serve_forever, name="bucket-proxy")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        client.close()

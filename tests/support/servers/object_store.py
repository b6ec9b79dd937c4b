"""A real S3 server over HTTP for the length of a block: moto's, in a process of its own, so that it can be stopped.

Without moto the test fails: a suite that skips its object store proves nothing about it.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import boto3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
_PROGRAM = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class ObjectStore:
    """Its buckets are in its memory. `environment` is what a client reads. Tests look into it with boto3."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}
        session = boto3.Session("key", "secret", region_name="us-east-1")
        self._client: Any = session.client("s3", endpoint_url=self.endpoint)

    def bucket(self, name: str) -> str:
        """The blob URL of a new bucket."""
        self._client.create_bucket(Bucket=name)
        return f"s3://{name}/store"

    def keys(self, url: str) -> list[str]:
        """Every object under a blob URL, without its prefix."""
        bucket, prefix = _place(url, "")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [each["Key"].removeprefix(prefix) for page in pages for each in page.get("Contents", ())]

    def read(self, url: str, key: str) -> bytes:
        bucket, name = _place(url, key)
        data: bytes = self._client.get_object(Bucket=bucket, Key=name)["Body"].read()
        return data

    def write(self, url: str, key: str, data: bytes) -> None:
        bucket, name = _place(url, key)
        self._client.put_object(Bucket=bucket, Key=name, Body=data)

    def delete(self, url: str, key: str) -> None:
        bucket, name = _place(url, key)
        self._client.delete_object(Bucket=bucket, Key=name)


def _place(url: str, key: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/{key}"


@contextmanager
def running() -> Iterator[ObjectStore]:
    command = [sys.executable, "-P", "-c", _PROGRAM]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 120)
    line = process.stdout.readline() if ready else ""
    assert line.strip().isdigit(), "moto's server did not start: is moto installed?"
    store = ObjectStore(int(line))
    try:
        yield store
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def in_environment(bucket: str) -> Iterator[ObjectStore]:
    """A running one with this bucket, which this process finds as a server does: by its environment."""
    with running() as store, patch.dict(os.environ, store.environment):
        store.bucket(bucket)
        yield store

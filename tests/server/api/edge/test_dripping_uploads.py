"""Uploads that drip, announce more than they send, or fill the disk: others keep their slots, the database its room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.edge.upload_slots import OWN_SLOTS, UploadSlots
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.api.wire.errors import ApiError
from support.servers.live_server import serving
from support.servers.raw_http import dial, head, read_response
from support.servers.waiting import wait_until
from support.worlds.adapter_memory import FakeClock

FORM = {"Content_Type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
MAX_UPLOADS = 4


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, admin_keys=("admin-key-for-tests",), max_uploads=MAX_UPLOADS)


def test_one_tenants_dripping_uploads_leave_the_others_their_slots(
    client: httpx.Client,
    other: httpx.Client,
    upload: Callable[..., httpx.Response],
    url: str,
    keys: dict[str, str],
    data_dir: Path,
) -> None:
    spool = data_dir / "uploads"
    with ExitStack() as stack:
        for _ in range(MAX_UPLOADS):
            connection = stack.enter_context(dial(url))
            connection.sendall(head("POST", "/v1/adapters", key=keys["acme"], **FORM, Content_Length="100000") + PART)
        wait_until(lambda: spool.exists() and len(list(spool.iterdir())) == MAX_UPLOADS)
        refused = upload(client, "mine")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_uploads")
        assert f"{MAX_UPLOADS} of them yours" in refused.json()["error"]["message"]
        assert upload(other, "theirs").status_code == 201
    wait_until(lambda: not any(spool.iterdir()))
    assert upload(client, "mine").status_code == 201


def test_an_upload_that_drips_is_ended(
    engine: EngineClient, store: AdapterStore, keys: dict[str, str], data_dir: Path
) -> None:
    """Each byte comes long before the idle time-out; the whole would take as long as the sender likes."""
    settings = ApiSettings(data_dir=data_dir, idle_timeout_s=3.0, min_upload_bytes_per_s=1_000_000)
    is_over = threading.Event()
    with serving(create_app(engine=engine, store=store, settings=settings)) as url, dial(url) as connection:
        connection.sendall(head("POST", "/v1/adapters", key=keys["acme"], **FORM, Content_Length="100000") + PART)

        def drip() -> None:
            while not is_over.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            answer = read_response(connection)
        finally:
            is_over.set()
            thread.join()
    assert (answer.status, answer.error["code"]) == (408, "upload_too_slow")


@pytest.fixture
def full(engine: EngineClient, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A server whose disk has nothing but the reserve left: its URL, a key, and its folder of uploads."""
    store = AdapterStore.open(tmp_path, reserve_bytes=1 << 60)
    key = store.tenants.create("acme").api_key
    with serving(create_app(engine=engine, store=store, settings=ApiSettings(data_dir=tmp_path))) as url:
        yield url, key, tmp_path / "uploads"
    store.close()


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/files"])
def test_an_announced_upload_without_room_is_refused_before_its_body(full: tuple[str, str, Path], path: str) -> None:
    url, key, _ = full
    with dial(url) as connection:
        connection.sendall(head("POST", path, key=key, **FORM, Content_Length="100000"))
        answer = read_response(connection)
    assert (answer.status, answer.error["code"]) == (503, "disk_full")


def test_what_is_not_announced_is_counted_as_it_comes_and_nothing_is_written(full: tuple[str, str, Path]) -> None:
    url, key, spool = full
    chunk = PART + b"x" * 5000
    with dial(url) as connection:
        start = head("POST", "/v1/adapters", key=key, **FORM, Transfer_Encoding="chunked")
        connection.sendall(start + f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        answer = read_response(connection)
    assert (answer.status, answer.error["code"]) == (503, "disk_full")
    wait_until(lambda: not any(spool.iterdir()))


class Disk:
    def __init__(self, num_free: int) -> None:
        self.num_free = num_free

    def has_room(self, num_bytes: int) -> bool:
        return num_bytes <= self.num_free


def slots(disk: Disk, *, max_uploads: int = 4, clock: FakeClock | None = None) -> UploadSlots:
    return UploadSlots(max_uploads, disk.has_room, min_bytes_per_s=100, grace_s=10, clock=clock or FakeClock())


def test_uploads_under_way_have_claimed_what_they_announced() -> None:
    disk = Disk(1000)
    upload_slots = slots(disk)
    with upload_slots.taken("a") as first, upload_slots.taken("b") as second:
        first.claim(700)
        with pytest.raises(StoreError, match="no room for 1100 bytes"):
            second.claim(400)
        with pytest.raises(StoreError, match="no room for 1001 bytes"):
            second.arrived(301)  # nothing announced: beside what the first has claimed
        second.claim(300)
        first.arrived(500)
        disk.num_free -= 500
        assert upload_slots.num_claimed == 500
        disk.num_free = 100  # taken by something else: the reserve is honoured all the same
        with pytest.raises(StoreError):
            first.arrived(200)
    assert upload_slots.num_claimed == len(upload_slots._running) == 0


def test_the_least_speed_holds_on_average_after_a_while() -> None:
    clock = FakeClock()
    with slots(Disk(10**9), clock=clock).taken("a") as incoming:
        for _ in range(9):
            clock.advance(1)
            incoming.arrived(1)
        incoming.arrived(10_000)
        clock.advance(101)
        incoming.arrived(1)
        clock.advance(10)
        with pytest.raises(ApiError, match="it must send 100 bytes per second") as caught:
            incoming.arrived(1)
    assert (caught.value.status, caught.value.code) == (408, "upload_too_slow")


def test_every_tenant_has_slots_of_its_own_and_the_whole_is_bounded() -> None:
    upload_slots = slots(Disk(10**9))
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(upload_slots.taken("flood"))
        for tenant in ("a", "b"):
            for _ in range(OWN_SLOTS):
                stack.enter_context(upload_slots.taken(tenant))
        for tenant in ("flood", "a", "late"):
            with pytest.raises(ApiError) as caught:
                stack.enter_context(upload_slots.taken(tenant))
            assert (caught.value.status, caught.value.code) == (429, "too_many_uploads")
    assert not upload_slots._running

"""The limit of open files: raised at the start, divided between connections and the store, and kept."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from server.cli.common.failures import CommandError
from server.cli.common.listening import RESERVED_FILES, ConnectionLimits, limits_within
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from support.servers.raw_http import dial, head, read_response

ROOT = Path(__file__).parents[4]
OPEN_FILES = 400
ROOM = OPEN_FILES - RESERVED_FILES
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
SERVER = f"""
import sys
sys.path[:0] = {PATHS!r}
import resource
from pathlib import Path
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.settings import ApiSettings
from server.cli.common.listening import ConnectionLimits, limits_within, raise_soft_limit
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import tiny_base
from support.worlds.fake_engine import FakeEngine
from support.servers.live_server import serving
from support.models.tokenizer_zoo import byte_level, wrapped
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {OPEN_FILES}))
limits = limits_within(ConnectionLimits(2048, 2048), raise_soft_limit())
folder = Path(sys.argv[1])
store = AdapterStore.open(folder)
settings = ApiSettings(
    data_dir=folder, auth="off", admin_keys=("admin-key-for-tests",),
    max_connections=limits.total, max_connections_per_address=limits.each, header_timeout_s=300.0,
)
with FakeEngine(tiny_base(), Tokenizer(wrapped(byte_level()))) as engine:
    with serving(create_app(engine=engine, store=store, settings=settings), loop=sys.argv[2]) as url:
        print(url, limits.total, flush=True)
        sys.stdin.read()
store.close()
"""


@contextmanager
def server_with_few_files(folder: Path, loop: str) -> Iterator[tuple[str, int]]:
    """Its URL and its limit of connections."""
    command = [sys.executable, "-c", SERVER, str(folder), loop]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, limit = process.stdout.readline().split()
        try:
            yield url, int(limit)
        finally:
            process.communicate(timeout=60)


def upload(url: str, tenant: str) -> int:
    files = {"config": config_bytes(), "weights": safetensors_bytes(lora_tensors(tiny_base(), seed=1))}
    headers = {"X-Tenant-Id": tenant}
    return httpx.post(f"{url}/v1/adapters", data={"name": "law"}, files=files, headers=headers, timeout=60).status_code


@pytest.fixture
def many_files() -> Iterator[None]:
    """For this process, which is all the clients."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_uploads_and_the_database_work_while_all_connections_are_taken(tmp_path: Path, loop: str) -> None:
    admin = {"Authorization": "Bearer admin-key-for-tests"}
    with server_with_few_files(tmp_path, loop) as (url, limit), ExitStack() as stack:
        assert limit == ROOM
        working = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        assert working.get("/health").status_code == 200
        num_held = 0
        for _ in range(3 * OPEN_FILES):  # far more than the process could hold
            connection = stack.enter_context(dial(url))
            if num_held + 1 < limit:
                connection.sendall(head("GET", "/health"))
                assert read_response(connection).status == 200
                num_held += 1
        late = stack.enter_context(dial(url))
        refused = read_response(late)
        assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
        for index in range(3):
            created = working.post("/admin/tenants", json={"name": f"tenant-{index}"}, headers=admin)
            assert created.status_code == 201, created.text
            files = {"config": config_bytes(), "weights": safetensors_bytes(lora_tensors(tiny_base(), seed=index))}
            stored = working.post("/v1/adapters", data={"name": f"law-{index}"}, files=files)
            assert stored.status_code == 201, stored.text


@pytest.mark.usefixtures("many_files")
def test_connections_that_end_make_room(tmp_path: Path) -> None:
    with server_with_few_files(tmp_path, "asyncio") as (url, limit):
        for _ in range(2):
            with ExitStack() as stack:
                for _ in range(limit):
                    connection = stack.enter_context(dial(url))
                    connection.sendall(head("GET", "/health"))
                    assert read_response(connection).status == 200
                assert read_response(stack.enter_context(dial(url))).status == 503
            with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
                answers = [client.get(f"{url}/health").status_code for _ in range(20)]
            assert answers[-1] == 200
        assert upload(url, "acme") == 201


@pytest.mark.parametrize(
    ("asked", "open_files", "given"),
    [
        ((2048, 1024), 1 << 20, (2048, 1024)),
        ((2048, 1024), 2048 + RESERVED_FILES, (2048, 1024)),
        ((2048, 1024), 1024, (768, 384)),
        ((2048, 2048), 1024, (768, 768)),
        ((2048, 1), 1024, (768, 1)),
        ((5_000_000, 1024), 20_000, (19_744, 1024)),
    ],
)
def test_fewer_files_are_fewer_connections(asked: tuple[int, int], open_files: int, given: tuple[int, int]) -> None:
    assert limits_within(ConnectionLimits(*asked), open_files) == ConnectionLimits(*given)


def test_too_few_files_are_refused_by_number() -> None:
    with pytest.raises(CommandError, match=f"256 files and needs at least {RESERVED_FILES + 16}") as caught:
        limits_within(ConnectionLimits(2048, 1024), 256)
    assert caught.value.code == "too_few_files"

"""docs/architecture.md: every room has its line, and the way to the first token passes the files it names."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.settings import ApiSettings
from support.servers.live_server import serving
from support.servers.service import TENANT, running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ASSETS = ROOT / "server" / "demo" / "assets"
PRODUCT = ("server", "adapters_store", "kernels", "trainer")
ADMIN_KEY = "an admin key of this test"


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_room_has_one_line_and_its_door_exists() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \| .+ \| `([\w.]+)` \|$", section("Rooms"), flags=re.MULTILINE)
    rooms = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in PRODUCT
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(room for room, _ in rows) == sorted(rooms)
    assert [room + door for room, door in rows if not (ROOT / room / door).is_file()] == []


class Trace:
    """The product's files of which a function ran while it was on, in any thread that began after it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.is_on = False

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        if self.is_on and event == "call":
            self.files.add(frame.f_code.co_filename)

    def of_product(self) -> set[str]:
        paths = {Path(name) for name in self.files if name.startswith(str(ROOT))}
        names = {str(path.relative_to(ROOT)) for path in paths}
        return {name for name in names if name.split("/")[0] in PRODUCT}


@pytest.fixture
def trace() -> Iterator[Trace]:
    trace = Trace()
    threading.setprofile(trace)
    yield trace
    threading.setprofile(None)


def test_a_cold_chat_request_passes_the_files_that_the_page_names(trace: Trace, tmp_path: Path) -> None:
    with running(ASSETS / "base", {"law": ASSETS / "adapters" / "law"}, tmp_path) as service:
        settings = ApiSettings(data_dir=tmp_path, admin_keys=(ADMIN_KEY,))
        with serving(create_app(engine=service.worker, store=service.store, settings=settings)) as url:
            trace.is_on = True
            answer = httpx.post(
                f"{url}/v1/chat/completions",
                headers={"Authorization": f"Bearer {ADMIN_KEY}", "X-Tenant-Id": TENANT},
                json={"model": "law", "stream": True, "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]},
                timeout=120,
            )
            trace.is_on = False
    assert answer.status_code == 200
    assert "data: [DONE]" in answer.text
    way = section("From HTTP to the first token")
    named = re.findall(r"^\| `([\w/.]+)` \|", way, flags=re.MULTILINE)
    passed = trace.of_product()
    assert len(named) > 25
    assert [name for name in named if name not in passed] == []
    [about] = re.findall(r"passes about (\d+) files", way)
    assert abs(len(passed) - int(about)) <= 15, len(passed)


def test_every_method_that_the_life_of_a_request_names_exists() -> None:
    page = (ROOT / "docs" / "lifecycle.md").read_text()
    sources = [path.read_text() for folder in ("server", "adapters_store") for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([A-Z]\w+)\.(_?[a-z]\w+)`", page)
    assert len(named) >= 6
    for owner, method in named:
        where = [text for text in sources if f"class {owner}" in text]
        assert any(f"def {method}(" in text for text in where), f"{owner}.{method}"

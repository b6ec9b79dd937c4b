"""One browser for the tests of a file; each visit has a profile of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from support.servers.browser import browsing


@pytest.fixture(
    scope="module"
)  # while it is open, Playwright's event loop keeps asyncio.run from the thread's other tests
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser

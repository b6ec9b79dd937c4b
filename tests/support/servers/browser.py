"""A real browser for tests of pages: the system's Chromium through Playwright, and what it complained about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

PICTURES = Path(__file__).parents[3] / "build" / "console"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 120_000  # only a broken page takes as long
expect.set_options(timeout=TIMEOUT_MS)
_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy violated: ${event.effectiveDirective} ${event.blockedURI}`));
"""


class NoBrowser(RuntimeError):
    """No Chromium on this machine; the message says how to get it."""


def chromium() -> str:
    """Its path. Raises NoBrowser."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise NoBrowser(f"no {', '.join(NAMES)}: run `make chromium`, or install Debian's package chromium")
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """One headless browser with a new, empty profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """One open page. complaints: errors and warnings of its console, violated policies, uncaught exceptions."""

    context: BrowserContext
    page: Page
    complaints: list[str] = field(default_factory=list)

    def note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")


@contextmanager
def visit(browser: Browser, url: str, **options: object) -> Iterator[Visit]:
    """A page of its own, with storage of its own, at `url`. options: of Playwright's new_context."""
    context = browser.new_context(reduced_motion="reduce", **options)  # type: ignore[arg-type]
    context.set_default_timeout(TIMEOUT_MS)
    context.add_init_script(_VIOLATIONS)
    visit = Visit(context, context.new_page())
    visit.page.on("console", visit.note)
    visit.page.on("pageerror", lambda error: visit.complaints.append(f"uncaught: {error}"))
    try:
        visit.page.goto(url)
        yield visit
    finally:
        context.close()


def sign_in(page: Page, key: str) -> None:
    """Give the console a key."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Open the console").click()
    expect(page.get_by_role("navigation", name="Views")).to_be_visible()


def keep_picture(page: Page, name: str) -> None:
    """What the window shows as a picture, for people, in build/console."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")

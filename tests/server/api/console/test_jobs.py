"""Jobs in the console: a real worker, whose trainer needs no torch. Texts of tenants that try to be HTML stay text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, FilePayload, Page, Route, expect

from server.api.app import create_app
from server.api.settings import ApiSettings
from server.engine.text.tokenizer import Tokenizer
from support.servers.browser import DESKTOP, Visit, keep_picture, sign_in, visit
from support.servers.job_world import JobWorld, data_lines
from support.servers.live_server import serving
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ADMIN_KEY = "an-admin-key-for-the-console"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path_factory.mktemp("jobs"))
    world.start_worker()
    yield world
    world.close()


@pytest.fixture(scope="module")
def url(world: JobWorld, tokenizer: Tokenizer) -> Iterator[str]:
    settings = ApiSettings(data_dir=world.data_dir, admin_keys=(ADMIN_KEY,))
    with FakeEngine(world.base, tokenizer) as engine:
        app = create_app(engine=engine, store=world.store, settings=settings)
        with serving(app) as url:
            yield f"{url}/console"


@pytest.fixture(scope="module")
def key(world: JobWorld) -> str:
    return world.store.tenants.rotate_key("acme").api_key


@pytest.fixture
def tenants(browser: Browser, url: str, key: str) -> Iterator[Visit]:
    """The jobs of a tenant. Its browser complained about nothing."""
    with visit(browser, f"{url}#jobs", viewport=DESKTOP) as opened:
        sign_in(opened.page, key)
        yield opened
        assert opened.complaints == []
        expect(opened.page.locator("img[src=x], #view script")).to_have_count(0)
        assert "owned" not in opened.page.title()


def start(page: Page, name: str, data: bytes, filename: str = "data.jsonl") -> None:
    file: FilePayload = {"name": filename, "mimeType": "application/jsonl", "buffer": data}
    page.get_by_label("Choose a file").set_input_files(file)
    expect(page.get_by_text("12 examples")).to_be_visible()
    page.get_by_label("Name of the adapter").fill(name)
    page.get_by_role("button", name="Start the job").click()
    expect(page.get_by_role("region", name="Job", exact=True).get_by_text(name)).to_be_visible()


def status(page: Page, word: str) -> None:
    expect(page.get_by_role("region", name="Job", exact=True).get_by_text(word, exact=True)).to_be_visible()


def test_a_job_goes_from_a_dropped_file_to_its_report(tenants: Visit, key: str) -> None:
    page = tenants.page
    data = data_lines(salt=HOSTILE, samples=[[HOSTILE, "expected", "base's", f"{HOSTILE}!"]])
    start(page, "style", data, filename=f"{HOSTILE.replace('/', '')}.jsonl")
    status(page, "succeeded")
    loss = page.get_by_role("region", name="Loss").get_by_role("img")
    expect(loss).to_have_attribute(
        "aria-label", "Training loss from 2.000 at step 1 to 0.200 at step 10; validation loss 0.100."
    )
    expect(page.get_by_role("region", name="Events").get_by_text("The gate's verdict: pass")).to_be_visible()
    expect(page.get_by_role("region", name="Gate").get_by_text("passed")).to_be_visible()
    sample = page.get_by_role("article", name="Held-out prompt")
    expect(sample.get_by_text(HOSTILE, exact=True)).to_be_visible()
    expect(sample.get_by_text(f"{HOSTILE}!", exact=True)).to_be_visible()
    keep_picture(page, "jobs")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the whole report").click()
    assert saved.value.path().read_text() == "<p>The report of this run.</p>"
    page.get_by_role("link", name="Ask it").click()
    expect(page.get_by_role("checkbox", name="ft:tiny:acme:style:1")).to_be_checked()


def test_a_running_job_shows_its_loss_and_is_paused_resumed_and_cancelled(tenants: Visit) -> None:
    page = tenants.page
    start(page, "long", data_lines(salt="long", steps=400, step_s=1))
    expect(page.get_by_role("img", name="Training loss from 1.000 at step 2")).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    status(page, "paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    status(page, "cancelled")


def test_an_operator_overrules_the_gate_with_a_reason(tenants: Visit, browser: Browser, url: str) -> None:
    start(tenants.page, "blocked", data_lines(salt="blocked", verdict="block", samples=[]))
    status(tenants.page, "failed")
    expect(tenants.page.get_by_role("alert")).to_contain_text("gate_blocked")
    expect(tenants.page.get_by_role("region", name="Gate").get_by_text("worse than base")).to_be_visible()
    with visit(browser, f"{url}#{tenants.page.url.partition('#')[2]}", viewport=DESKTOP) as opened:
        page = opened.page
        sign_in(page, ADMIN_KEY)
        page.get_by_label("Reason to overrule the gate").fill(HOSTILE)
        page.get_by_role("button", name="Put into service").click()
        status(page, "succeeded")
        expect(page.get_by_role("region", name="Events")).to_contain_text(HOSTILE)
        expect(page.locator("img[src=x]")).to_have_count(0)
        assert opened.complaints == []


def test_a_file_with_bad_lines_is_shown_by_line_and_not_started(tenants: Visit) -> None:
    page = tenants.page
    bad = data_lines() + f'{{"{HOSTILE.replace(chr(34), "")}": 1}}\n'.encode()
    file: FilePayload = {"name": "bad.jsonl", "mimeType": "application/jsonl", "buffer": bad}
    page.get_by_label("Choose a file").set_input_files(file)
    card = page.get_by_role("region", name="New job")
    expect(card.get_by_text("Refused lines: 1")).to_be_visible()
    expect(card.get_by_text("unknown_format")).to_be_visible()
    expect(card).to_contain_text("line 13")
    expect(card.get_by_role("button", name="Start the job")).to_be_disabled()


def test_a_slow_list_of_jobs_does_not_take_the_reader_back(tenants: Visit) -> None:
    page = tenants.page
    start(page, "slow", data_lines(salt="slow", samples=[]))
    links = page.get_by_role("navigation", name="Views")
    links.get_by_role("link", name="Ask").click()
    expect(page.get_by_label("Prompt")).to_be_visible()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/v1/fine_tuning/jobs?*", hold)
    page.reload()
    links.get_by_role("link", name="Jobs").click()
    wait_until(lambda: page.wait_for_timeout(10) or held)
    links.get_by_role("link", name="Ask").click()
    with page.expect_response("**/v1/fine_tuning/jobs?*"):
        held[0].continue_()
    page.wait_for_timeout(500)
    assert page.url.endswith("#ask")
    expect(page.get_by_label("Prompt")).to_be_visible()


def test_a_models_answer_that_tries_to_be_html_stays_text(tenants: Visit) -> None:
    page = tenants.page
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Ask").click()
    page.get_by_text("Settings").click()
    page.get_by_label("Form").select_option("text")
    page.get_by_label("Prompt").fill(HOSTILE)  # which the engine repeats
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("article", name="Answer of tiny").locator(".answer-text")).to_contain_text(HOSTILE)

"""The console in a real browser, over a real engine with the demo's base and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_core_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Locator, Page, expect

from server.api.app import create_app
from server.api.settings import ApiSettings
from server.demo.assets import BASE_NAME, demo_adapters, demo_base_path
from support.servers.browser import DESKTOP, PHONE, Visit, keep_picture, sign_in, visit
from support.servers.live_server import serving
from support.servers.service import TENANT, Service, running

ADMIN_KEY = "an-admin-key-for-the-console"
QUESTION = "How do I bake bread?"
LAW = demo_adapters()["law"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def service(data_dir: Path) -> Iterator[Service]:
    with running(demo_base_path(), demo_adapters(), data_dir, served_name=BASE_NAME) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service, data_dir: Path) -> Iterator[str]:
    settings = ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,), metrics_max_age_s=0)
    with serving(create_app(engine=service.worker, store=service.store, settings=settings)) as url:
        yield f"{url}/console"


@pytest.fixture(scope="module")
def key(service: Service) -> str:
    return service.store.tenants.rotate_key(TENANT).api_key


@pytest.fixture
def tenants(browser: Browser, url: str, key: str) -> Iterator[Visit]:
    """The console, opened with a tenant's key. Its browser complained about nothing."""
    with visit(browser, url, viewport=DESKTOP) as opened:
        sign_in(opened.page, key)
        yield opened
        assert opened.complaints == []


def view(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Views").get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", level=1, name=name)).to_be_visible()


def ask(page: Page, prompt: str = QUESTION) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Ask").click()


def answer_of(page: Page, model: str) -> Locator:
    return page.get_by_role("article", name=f"Answer of {model}")


def opened_row(page: Page, name: str) -> Locator:
    row = page.get_by_role("group", name=name, exact=True)
    row.locator("summary").click()
    expect(row.get_by_role("article").first).to_be_visible()
    return row


def test_the_base_and_three_adapters_answer_side_by_side(tenants: Visit) -> None:
    page = tenants.page
    ask(page)
    expect(page.get_by_text("tokens/s together")).to_be_visible()
    for name in (BASE_NAME, *demo_adapters()):
        card = answer_of(page, name)
        expect(card).to_have_attribute("data-state", "done")
        figures = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
        assert int(figures["tokens/s"].replace(",", "")) > 0
        assert figures["first token"].endswith(" s") or figures["first token"].endswith(" ms")
        assert int(figures["tokens"].replace(",", "")) > 1
    assert len(set(page.locator(".answer-text").all_inner_texts())) == 4
    ask(page)  # the same again: the prefix cache has the prompt
    expect(answer_of(page, "law").get_by_text("8 of")).to_be_visible()


def test_answers_that_have_not_begun_can_be_stopped(tenants: Visit, service: Service) -> None:
    page = tenants.page
    with service.held():
        ask(page)
        expect(page.locator(".answer[data-state=waiting]")).to_have_count(4)
        answer_of(page, "law").get_by_role("button", name="Stop").click()
        expect(answer_of(page, "law")).to_have_attribute("data-state", "stopped")
        page.get_by_role("button", name="Stop all").click()
        expect(page.locator(".answer[data-state=stopped]")).to_have_count(4)


def test_a_refused_request_shows_code_and_message(browser: Browser, url: str, key: str) -> None:
    with visit(browser, url, viewport=DESKTOP) as opened:
        page = opened.page
        sign_in(page, key)
        page.get_by_text("Settings").click()
        page.get_by_label("Most tokens").fill("30000")
        ask(page)
        alert = answer_of(page, "law").get_by_role("alert")
        expect(alert).to_contain_text("context_length_exceeded")
        expect(alert).to_contain_text("30000")
        assert all("400" in complaint for complaint in opened.complaints)


def test_a_wrong_key_opens_nothing_and_a_right_one_is_in_no_address(browser: Browser, url: str, key: str) -> None:
    with visit(browser, url, viewport=PHONE) as opened:
        page, addresses = opened.page, []
        page.on("request", lambda request: addresses.append(request.url))
        page.get_by_label("API key").fill("ml-wrong")
        page.get_by_role("button", name="Open the console").click()
        expect(page.get_by_role("alert")).to_contain_text("invalid_api_key")
        keep_picture(page, "door")
        sign_in(page, key)
        view(page, "Adapters")
        assert page.evaluate("Object.values(sessionStorage)") == [key]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert len(addresses) > 5
        assert not any(key in address for address in addresses)
        assert len({address.split("/")[2] for address in addresses}) == 1, "one host"
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("API key")).to_be_focused()
        assert page.evaluate("sessionStorage.length") == 0
        assert all("401" in complaint for complaint in opened.complaints)


def test_an_adapter_is_uploaded_tried_as_a_canary_promoted_and_rolled_back(tenants: Visit) -> None:
    page = tenants.page
    view(page, "Adapters")
    page.get_by_label("Choose a folder").set_input_files(LAW)
    card = page.get_by_role("region", name="Upload an adapter")
    expect(card.get_by_text("adapter_model.safetensors, ")).to_be_visible()
    expect(card.get_by_label("Name", exact=True)).to_have_value("law")  # the folder's
    card.get_by_label("Name", exact=True).fill("fresh")
    card.get_by_role("button", name="Upload").click()
    expect(card.get_by_text("fresh@1 is in service")).to_be_visible()
    page.get_by_label("Choose a folder").set_input_files(demo_adapters()["code"])
    card.get_by_label("Name", exact=True).fill("fresh")
    card.get_by_text("Let the name mean").click()
    card.get_by_role("button", name="Upload").click()
    expect(card.get_by_text("fresh@2 is stored")).to_be_visible()

    row = opened_row(page, "fresh")
    second = row.get_by_role("article", name="Version 2")
    second.get_by_label("Canary share").fill("25")
    second.get_by_role("button", name="Set canary").click()
    expect(second.get_by_text("canary 25 %")).to_be_visible()
    expect(row.locator("summary")).to_contain_text("75 %, canary 25 %")
    row.get_by_role("button", name="Promote the canary").click()
    expect(second.get_by_text("active", exact=True)).to_be_visible()
    row.get_by_role("button", name="Roll back").click()
    expect(row.get_by_role("article", name="Version 1").get_by_text("active", exact=True)).to_be_visible()
    row.get_by_role("button", name="Unload fresh@2").click()
    expect(second.get_by_text("unloaded")).to_be_visible()
    second.get_by_role("button", name="Activate").click()
    expect(row.locator("summary")).to_contain_text("version 2")


def test_a_refused_upload_is_shown_in_the_servers_words(browser: Browser, url: str, key: str) -> None:
    """Dropped, not chosen; and its config, which tries to be HTML, stays text."""
    hostile = "<img src=x onerror=alert(1)>"
    config = json.loads((LAW / "adapter_config.json").read_text()) | {"peft_type": hostile}
    with visit(browser, url, viewport=DESKTOP) as opened:
        page = opened.page
        sign_in(page, key)
        view(page, "Adapters")
        transfer = page.evaluate_handle(
            """(config) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([config], "adapter_config.json"));
                transfer.items.add(new File(["not tensors"], "adapter_model.safetensors"));
                return transfer;
            }""",
            json.dumps(config),
        )
        page.locator(".drop").dispatch_event("drop", {"dataTransfer": transfer})
        card = page.get_by_role("region", name="Upload an adapter")
        card.get_by_label("Name", exact=True).fill("bad")
        card.get_by_role("button", name="Upload").click()
        expect(card.get_by_role("alert")).to_contain_text("unsupported_peft_type")
        expect(card.get_by_role("alert")).to_contain_text(hostile)
        expect(page.locator("img[src=x]")).to_have_count(0)
        assert all("400" in complaint for complaint in opened.complaints)


def test_an_operator_sees_tenants_and_pins(browser: Browser, url: str) -> None:
    with visit(browser, url, viewport=DESKTOP) as opened:
        page = opened.page
        sign_in(page, ADMIN_KEY)
        ask(page)
        expect(page.get_by_text("tokens/s together")).to_be_visible()
        view(page, "Operator")
        row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=TENANT))
        expect(row).to_contain_text("\N{INFINITY}")
        expect(page.get_by_role("img", name="Adapter memory")).to_be_visible()
        view(page, "Adapters")
        law = opened_row(page, f"{TENANT}/law")
        law.get_by_role("button", name="Pin").click()
        expect(law.locator("summary")).to_contain_text("device, pinned")
        law.get_by_role("button", name="Unpin").click()
        expect(law.locator("summary")).not_to_contain_text("pinned")
        assert opened.complaints == []


def test_an_operator_makes_a_tenant_sets_its_quotas_and_rotates_its_key(
    browser: Browser, url: str, service: Service
) -> None:
    def opens(key: str) -> bool:
        answer = httpx.get(f"{url.removesuffix('/console')}/v1/models", headers={"Authorization": f"Bearer {key}"})
        return answer.status_code == 200

    with visit(browser, f"{url}#operator", viewport=PHONE) as opened:
        page = opened.page
        sign_in(page, ADMIN_KEY)
        page.get_by_label("Name of a new tenant").fill("newcomer")
        page.get_by_role("button", name="Create").click()
        first = page.get_by_text("The key of newcomer").locator("..").get_by_role("code").inner_text()
        assert opens(first)
        page.get_by_role("button", name="Edit newcomer").click()
        card = page.get_by_role("region", name="Tenant", exact=True)
        card.get_by_label("Weight").fill("2.5")
        card.get_by_label("Requests a minute").fill("70")
        card.get_by_role("button", name="Save quotas").click()
        expect(card.get_by_role("status")).to_contain_text("Saved")
        row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="newcomer"))
        expect(row.get_by_role("cell", name="70", exact=True)).to_be_visible()
        quotas = service.store.quotas.get("newcomer")
        assert (quotas.weight, quotas.requests_per_minute, quotas.max_adapters) == (2.5, 70, None)
        card.get_by_role("button", name="Disable").click()
        expect(row).to_contain_text("disabled")
        assert not opens(first)
        card.get_by_role("button", name="Enable").click()
        expect(row).not_to_contain_text("disabled")
        card.get_by_role("button", name="Rotate key").click()
        expect(card.get_by_text("The key of newcomer")).to_be_visible()
        second = card.get_by_role("code").inner_text()
        assert opens(second)
        assert not opens(first)
        card.get_by_role("button", name="Close").click()
        expect(page.get_by_role("button", name="Edit newcomer")).to_be_focused()
        expect(page.get_by_text(second)).to_have_count(0)
        assert opened.complaints == []


def test_a_tenants_key_is_refused_as_an_operators(browser: Browser, url: str, key: str) -> None:
    with visit(browser, f"{url}#operator", viewport=DESKTOP) as opened:
        sign_in(opened.page, key)
        expect(opened.page.get_by_role("link", name="Operator")).to_be_hidden()
        expect(opened.page.get_by_role("alert")).to_contain_text("admin_key_required")


def test_a_gateway_that_hides_the_metrics_leaves_the_rest(browser: Browser, url: str, key: str) -> None:
    with visit(browser, url, viewport=DESKTOP) as opened:
        page = opened.page
        page.route("**/metrics", lambda route: route.fulfill(status=403, body="scrapers only"))
        sign_in(page, key)
        expect(page.get_by_role("region", name="Server")).to_contain_text("no metrics")
        view(page, "Adapters")
        expect(page.get_by_role("group", name="law", exact=True)).to_contain_text("unknown")
        assert all("403" in complaint for complaint in opened.complaints)


def test_the_keyboard_alone_signs_in_chooses_and_asks(browser: Browser, url: str, key: str) -> None:
    with visit(browser, url, viewport=DESKTOP) as opened:
        page = opened.page
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("navigation", name="Views")).to_be_visible()
        page.get_by_label("Prompt").focus()
        page.keyboard.type(QUESTION)
        page.keyboard.press("Tab")
        box = page.get_by_role("checkbox", name=BASE_NAME)
        expect(box).to_be_focused()
        page.keyboard.press("Space")
        expect(box).not_to_be_checked()
        page.get_by_label("Prompt").focus()
        page.keyboard.press("Control+Enter")
        expect(page.get_by_text("3 answers")).to_be_visible()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_axe_finds_nothing_and_a_phone_needs_no_sideways_scroll(browser: Browser, url: str) -> None:
    """bypass_csp: axe is put into the page, which its policy forbids."""
    with visit(browser, url, viewport=DESKTOP, bypass_csp=True) as opened:
        page = opened.page
        page.evaluate(AXE_SCRIPT)
        faults = {"door": axe(page)}
        sign_in(page, ADMIN_KEY)
        ask(page)
        expect(page.get_by_text("tokens/s together")).to_be_visible()
        for name in ("Ask", "Adapters", "Jobs", "Operator"):
            for scheme, viewport in (("light", DESKTOP), ("dark", PHONE)):
                page.set_viewport_size(viewport)
                page.emulate_media(color_scheme=scheme)
                if scheme == "light":
                    view(page, name)
                if (name, scheme) == ("Adapters", "light"):
                    opened_row(page, f"{TENANT}/law")
                if (name, scheme) == ("Operator", "light"):
                    page.get_by_role("button", name=f"Edit {TENANT}").click()
                keep_picture(page, f"{name.lower()}-{scheme}")
                faults[f"{name}, {scheme}"] = axe(page)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    assert {name: found for name, found in faults.items() if found} == {}


def axe(page: Page) -> list[str]:
    """What breaks WCAG 2.2 AA, with the elements."""
    rules = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"],
        "resultTypes": ["violations"],  # what passes is not described, which takes most of the time
        "preload": False,  # of styles, for a rule that is none of these, and of media, of which there are none
    }
    found = page.evaluate("(rules) => axe.run(document, rules)", rules)["violations"]
    return [f"{rule['id']}: {node['html']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]

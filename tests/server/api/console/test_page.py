"""What /console answers: the package's own files to everyone, under a policy that lets the page load nothing else."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.console.route import PAGE, page_files
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from support.servers.live_server import serving

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "server" / "api" / "console" / "page"
SOURCES = {path.name: path.read_text() for path in FOLDER.iterdir()}
SELF_ONLY = {"script-src", "style-src", "connect-src", "img-src"}


def test_the_page_and_its_files_are_the_packages_own_for_every_caller(
    url: str, client: httpx.Client, settings: ApiSettings
) -> None:
    files = page_files(settings)
    assert set(files) == set(SOURCES)
    for caller in (httpx.Client(base_url=url), client):
        for name, text in files.items():
            answer = caller.get("/console" if name == PAGE else f"/console/{name}")
            assert (answer.status_code, answer.content) == (200, text)
        for name in (PAGE + "x", "..%2froute.py", "%2e%2e%2froute.py", "route.py", ""):
            assert caller.get(f"/console/{name}").status_code == 404


def test_every_file_forbids_what_the_page_does_not_need(url: str, settings: ApiSettings) -> None:
    for name in page_files(settings):
        headers = httpx.get(f"{url}/console/{name}").headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert {policy.pop(name) for name in SELF_ONLY} == {"'self'"}
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert set(policy.values()) == {"'none'"}
        assert {"default-src", "frame-ancestors", "base-uri", "form-action", "trusted-types"} == set(policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"


def test_no_source_has_an_address_of_another_host_or_parses_text_as_html() -> None:
    for name, text in SOURCES.items():
        hosts = set(re.findall(r"https?://([\w.]+)", text))
        assert hosts <= {"www.w3.org"}, name  # the name of SVG's namespace
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc", text), (
            name
        )
    page = SOURCES[PAGE]
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page) == []


def test_the_key_is_kept_in_the_tab_alone() -> None:
    text = "".join(SOURCES.values())
    assert "sessionStorage" in text
    assert not re.search(r"localStorage|document\.cookie|indexedDB", text)


def test_the_console_can_be_switched_off(engine: EngineClient, store: AdapterStore, settings: ApiSettings) -> None:
    with serving(create_app(engine=engine, store=store, settings=replace(settings, console="off"))) as url:
        for path in ("/console", "/console/app.js"):
            answer = httpx.get(url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    with pytest.raises(ValueError, match="console must be one of on, off"):
        replace(settings, console="maybe")


def test_without_keys_the_page_asks_for_a_tenant(settings: ApiSettings) -> None:
    assert b'data-auth="on"' in page_files(settings)[PAGE]
    assert b'data-auth="off"' in page_files(replace(settings, auth="off"))[PAGE]


def test_an_installed_package_has_every_file() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = shipped["server.api.console"]
    assert [name for name in SOURCES if not any(fnmatch.fnmatch(f"page/{name}", each) for each in patterns)] == []


def test_sources_stay_small() -> None:
    assert {name: len(text.splitlines()) for name, text in SOURCES.items() if len(text.splitlines()) > 300} == {}

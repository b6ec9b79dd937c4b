"""The pictures of the console in README and docs: `python -m support.servers.console_pictures [--real]`.

Starts the demo, gives one tenant three adapters and a real training job, and looks at the console as that tenant does.
With --real: the demo of the real model, as the tenant sees it that has just taught it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, expect

from server.demo import real
from server.demo.assets import demo_adapters
from server.demo.recipe.corpus import tenant_dialogues, write_jsonl
from server.demo.recipe.styles import Style
from support.servers.browser import browsing, sign_in, visit
from support.servers.waiting import wait_until

FOLDER = Path(__file__).parents[3] / "docs" / "images"
MAX_BYTES = 150_000
NAMES = {"counsel": "law", "clinic": "med", "reviewer": "code"}
QUESTION = "What should I avoid when I sign a contract?"
VIEWPORT = {"width": 1280, "height": 800}
NUM_EXAMPLES = 600


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if "--real" in arguments:
            with demo(Path(scratch), "--real") as answer:
                look(answer["url"], answer["keys"][real.TENANT], take_real)
            return
        with demo(Path(scratch), "--prompt", QUESTION) as answer:
            admin = (Path(scratch) / "data" / "admin.key").read_text().strip()
            look(answer["url"], prepare(answer["url"], admin, Path(scratch)), take_all)


def look(url: str, key: str, take: Callable[[Page], None]) -> None:
    """Take the pictures that a key's owner sees."""
    with browsing() as browser, visit(browser, f"{url}/console", viewport=VIEWPORT) as opened:
        sign_in(opened.page, key)
        take(opened.page)


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[dict[str, Any]]:
    """What a demo that runs has printed."""
    multilora = str(Path(sys.executable).with_name("multilora"))
    command = [multilora, "demo", "--port", "0", "--json", "--data-dir", str(folder / "data"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def prepare(url: str, admin: str, folder: Path) -> str:
    """The key of a tenant with three adapters, one with a canary, and a job that has ended."""
    operator = {"Authorization": f"Bearer {admin}"}
    key = str(httpx.post(f"{url}/admin/tenants", json={"name": "studio"}, headers=operator).json()["api_key"])
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600) as client:
        for name, style in NAMES.items():
            push(client, name, style)
        push(client, "counsel", "code", activate=False)
        client.post("/v1/adapters/counsel@2/canary", json={"percent": 10}).raise_for_status()
        write_jsonl(tenant_dialogues(Style.LAW, NUM_EXAMPLES), folder / "letters.jsonl")
        data = {"file": ("letters.jsonl", (folder / "letters.jsonl").read_bytes())}
        file = client.post("/v1/files", files=data, data={"purpose": "fine-tune"}).json()["id"]
        job = {
            "model": client.get("/v1/models").json()["data"][0]["id"],
            "training_file": file,
            "suffix": "lawyer",
            "hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 25},
            "multilora": {"rank": 8},
        }
        where = f"/v1/fine_tuning/jobs/{client.post('/v1/fine_tuning/jobs', json=job).raise_for_status().json()['id']}"
        wait_until(lambda: client.get(where).json()["finished_at"] is not None, timeout_s=3600)
        assert client.get(where).json()["status"] == "succeeded", client.get(where).json()["error"]
    return key


def push(client: httpx.Client, name: str, style: str, *, activate: bool = True) -> None:
    folder = demo_adapters()[style]
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    client.post("/v1/adapters", params={"activate": activate}, data={"name": name}, files=files).raise_for_status()


def take_all(page: Page) -> None:
    views = page.get_by_role("navigation", name="Views")
    page.get_by_role("checkbox", name="lawyer").uncheck()
    for name in NAMES:
        page.get_by_role("checkbox", name=name).check()
    page.get_by_label("Prompt").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("tokens/s together")).to_be_visible()
    take(page, "ask-light")
    page.emulate_media(color_scheme="dark")
    views.get_by_role("link", name="Jobs").click()
    expect(page.get_by_role("region", name="Gate")).to_be_visible()
    take(page, "jobs-dark")
    page.emulate_media(color_scheme="light")
    views.get_by_role("link", name="Adapters").click()
    page.get_by_role("group", name="counsel", exact=True).locator("summary").click()
    expect(page.get_by_role("article", name="Version 2")).to_be_visible()
    take(page, "adapters-light")


def take_real(page: Page) -> None:
    page.get_by_label("Prompt").fill(real.PROMPTS[0])
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("tokens/s together")).to_be_visible()
    take(page, "real-ask-light")
    page.emulate_media(color_scheme="dark")
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Jobs").click()
    expect(page.get_by_role("region", name="Gate")).to_be_visible()
    take(page, "real-jobs-dark")


def take(page: Page, name: str) -> None:
    """Raises ValueError for a picture that is too large for the repository."""
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    path = FOLDER / f"console-{name}.png"
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES} are kept in the repository")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])

"""docs/onboarding.md runs as written: the demo, a new tenant's key, the stock openai client from file to chat."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from server.demo.recipe.styles import Style
from support.models.styles import style_of
from support.servers.waiting import wait_until

PAGE = (Path(__file__).parents[2] / "docs" / "onboarding.md").read_text()
BIN = Path(sys.executable).parent


def block(kind: str, start: str) -> str:
    """The page's block of that kind that begins so."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    return next(text for text in blocks if text.startswith(start))


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """What a shell in which the product is installed has."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture
def demo(tmp_path: Path, port: int, shell: dict[str, str]) -> Iterator[str]:
    """The page's demo command, on a free port; its URL."""
    command = [*block("", "multilora demo").split(), "--port", str(port)]
    log = (tmp_path / "demo.log").open("wb")
    process = subprocess.Popen(command, cwd=tmp_path, env=shell, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_ready(url), timeout_s=1200)
        assert process.poll() is None, (tmp_path / "demo.log").read_text()
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
        log.close()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


class Neighbour:
    """A tenant who is served all the while."""

    def __init__(self, url: str, key: str) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)
        self.model = self.client.models.list().data[0].id
        self.answers: list[str] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        said = [{"role": "user", "content": "Tell me about cats."}]
        while not self.stopping.is_set():
            answer = self.client.chat.completions.create(model=self.model, messages=said, temperature=0)  # type: ignore[call-overload]
            self.answers.append(answer.choices[0].message.content)
            time.sleep(1.0)  # more would take the cores that the training needs


def test_the_pages_script_takes_a_tenant_from_a_file_to_a_chat(
    demo: str, tmp_path: Path, shell: dict[str, str]
) -> None:
    exports = block("", "export OPENAI_API_KEY").replace("http://127.0.0.1:8000", demo)
    printed = subprocess.run(
        ["bash", "-ec", f'{exports}\necho "$OPENAI_API_KEY"'], cwd=tmp_path, env=shell, capture_output=True, check=True
    )
    key = printed.stdout.decode().strip()
    neighbour = Neighbour(demo, key)
    (tmp_path / "script.py").write_text(block("python", "import time"))
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**shell, "OPENAI_API_KEY": key, "OPENAI_BASE_URL": f"{demo}/v1"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    wall_s = time.monotonic() - start_s
    neighbour.stopping.set()
    neighbour.thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
    base_says, *own_lines = [line for line in done.stdout.split("multilora-demo-base") if line.strip()][-2:]
    assert style_of(base_says) is Style.PLAIN, done.stdout
    assert style_of(own_lines[0]) is Style.LAW, done.stdout
    assert "ft:multilora-demo-base:newcomer:lawyer:1: " in done.stdout
    assert len(set(neighbour.answers)) == 1, "the base answered somebody else differently while a job ran"
    assert len(neighbour.answers) > 5
    print(f"from file to chat: {wall_s:.1f} s")

"""`multilora demo` with the shipped base and adapters: what a newcomer sees, and what he can paste."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters_store.store import AdapterStore
from server.cli.common.output import Output
from server.cli.common.texts import curl_line
from server.cli.demo.screen import round_table
from server.cli.main import app
from server.demo.recipe.styles import Style
from server.demo.showcase import Answer, Round
from support.models.styles import style_of
from support.servers.keys import owner_of
from support.servers.waiting import wait_until
from support.stopwatch import slowness

Command = Callable[..., Any]
TENANTS = ("law", "med", "code")


@pytest.fixture(scope="module")
def demo(start: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`multilora demo` as typed, its showcase over and its server up; temporary folders go where we can see them."""
    folder = tmp_path_factory.mktemp("temporary")
    with start("demo", env={"TMPDIR": str(folder)}) as process:
        wait_until(
            lambda: process.process.poll() is not None or "Ctrl-C stops the server." in process.lines, timeout_s=60
        )
        assert process.process.poll() is None, process.log
        process.folder = folder
        yield process


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What `multilora demo --once --json` answered, and the CPU seconds it took."""
    start_s = time.process_time()
    result = CliRunner().invoke(app, ["demo", "--once", "--json"])
    assert result.exit_code == 0, result.output
    return {**json.loads(result.stdout), "cpu_s": (time.process_time() - start_s) / slowness()}


def test_once_shows_the_answers_of_one_batch_in_seconds(told: dict[str, Any]) -> None:
    assert told["cpu_s"] < 30.0  # 15 s on two cores
    assert told["max_rows"] == 4
    assert told["shared_steps"] > told["num_steps"] / 2
    assert told["tokens_per_s"] > 0
    assert len(told["rounds"]) == 3


def test_each_tenant_answers_in_its_style_and_the_base_in_none(told: dict[str, Any]) -> None:
    for each in told["rounds"]:
        styles = {name: style_of(text) for name, text in each["answers"].items()}
        assert styles == {"base": Style.PLAIN, "law": Style.LAW, "med": Style.MED, "code": Style.CODE}, each


def test_prompts_of_ones_own_are_asked_and_a_servers_data_dir_is_left_alone(run_json: Command, data_dir: Path) -> None:
    """MULTILORA_DATA_DIR names what is served in earnest; a demo must not put its tenants there."""
    answer = run_json("demo", "--once", "--prompt", "How do I make tea?", "-p", "Tell me about cats.")
    assert [each["prompt"] for each in answer["rounds"]] == ["How do I make tea?", "Tell me about cats."]
    assert not data_dir.exists()


def test_people_see_the_four_side_by_side_and_what_was_measured(demo: Any) -> None:
    shown = "\n".join(demo.lines)
    header = next(line for line in demo.lines if "law" in line)
    assert [name.strip() for name in header.strip("│ ").split("│")] == ["base", *TENANTS]
    assert "tokens/s). Up to 4 requests shared a batch; " in shown
    assert f"ready on {demo.url}" in shown


def test_the_printed_curl_lines_work_as_they_are(demo: Any) -> None:
    answers = [
        json.loads(subprocess.run(line, shell=True, capture_output=True, check=True).stdout)
        for line in demo.lines
        if line.startswith("curl ")
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert [style_of(text) for text in texts] == [Style.LAW, Style.MED, Style.CODE, Style.PLAIN]


def test_the_printed_python_works_as_it_is(demo: Any) -> None:
    start = demo.lines.index("# python") + 1
    with redirect_stdout(StringIO()) as printed:
        exec("\n".join(demo.lines[start : start + 4]), {})
    assert style_of(printed.getvalue()) is Style.CODE


def test_the_script_of_the_tools_page_calls_tools_of_two_dialects_in_shared_steps(demo: Any) -> None:
    """What it prints is what the page shows."""
    page = (Path(__file__).parents[4] / "docs" / "tools.md").read_text()
    section = page.partition("## Two trained agents")[2]
    script, shown = (section.split(f"```{kind}\n")[1].partition("```")[0] for kind in ("python", "text"))
    keys = {line.split()[1]: line.split()[-1] for line in demo.lines if "calls tools" in line}
    assert keys.keys() == {"desk", "ward"}
    with redirect_stdout(StringIO()) as printed:
        exec(script, {"url": demo.url, "keys": keys})
    assert printed.getvalue() == shown
    assert shown.endswith("shared steps: True\n")


def test_the_printed_command_lists_the_adapters(demo: Any, run: Command) -> None:
    line = next(line for line in demo.lines if line.startswith("multilora adapter list"))
    listed = json.loads(run(*line.split()[1:], "--json").stdout)["data"]
    assert sorted((each["tenant"], each["name"]) for each in listed) == sorted(
        [*((name, "style") for name in TENANTS), *((name, "agent") for name in ("desk", "ward"))]
    )


def test_ctrl_c_ends_it_and_leaves_nothing(demo: Any) -> None:
    """Last of those that share the process."""
    assert list(demo.folder.iterdir()) != []
    assert demo.stop(signal.SIGINT) == 0
    assert list(demo.folder.iterdir()) == []
    assert demo.log == []


def test_json_is_one_object_and_the_server_stays_up_until_a_signal(run_json: Command, unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}"
    is_up_after = []

    def stop_later() -> None:
        try:
            wait_until(lambda: "multilora_finished_total 4.0" in _metrics(url))
            time.sleep(1)  # the object is printed meanwhile
            is_up_after.append(httpx.get(f"{url}/ready").status_code == 200)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_later)
    stopper.start()
    told = run_json("demo", "-p", "Tell me about cats.", "--port", str(unused_port))
    stopper.join()
    assert told["url"] == url
    assert is_up_after == [True]


def _metrics(url: str) -> str:
    try:
        return httpx.get(f"{url}/metrics").text
    except httpx.TransportError:
        return ""


def test_a_data_dir_is_kept_and_serves_again_with_new_keys(run_json: Command, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first, second = (run_json("demo", "--once", "-p", "Tell me a joke.", "--data-dir", kept) for _ in range(2))
    assert first["rounds"] == second["rounds"]
    store = AdapterStore.open(kept)
    try:
        assert owner_of(store, second["keys"]["law"]) == "law"
        assert owner_of(store, first["keys"]["law"]) is None
        assert len(store.list_versions()) == 5
    finally:
        store.close()


def test_a_busy_port_that_was_asked_for_exits_5(run: Command, busy_port: int) -> None:
    result = run("demo", "--once", "--port", str(busy_port))
    assert result.exit_code == 5
    assert result.stderr.startswith("port_in_use: ")


def test_a_prompt_that_does_not_fit_is_one_line(run: Command) -> None:
    result = run("demo", "--once", "--prompt", "tea and cake " * 4000)
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1


def test_what_would_steer_a_terminal_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Output().show(round_table(Round("p", {"base": Answer("a\x1b[2Jb\x07\x9bc\nd")})))
    shown = capsys.readouterr().out
    assert "a\ufffd[2Jb\ufffd\ufffdc" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("prompt", ['it\'s "quoted" $HOME `id` \\ !', "two\nlines", "日本語"])
def test_a_curl_line_carries_any_prompt_through_a_shell(prompt: str) -> None:
    line = curl_line("http://127.0.0.1:1", key="k", model="m", prompt=prompt, chat=False)
    shown = subprocess.run(line.replace("curl ", "printf '%s\\n' ", 1), shell=True, capture_output=True, check=True)
    body = json.loads(shown.stdout.decode().splitlines()[-1])
    assert body["prompt"] == prompt
